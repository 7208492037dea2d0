"""The formats that adapters come in. Reads and checks headers; loads no weights, no torch."""
