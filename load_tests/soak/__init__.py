"""The soak: mixed requests for hours, every answer compared, the server's memory watched."""
