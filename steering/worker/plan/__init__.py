"""The host's plan of a step, made before it runs, and its way to the device."""
