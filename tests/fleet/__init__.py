"""Several ranks or servers on one machine, really run: `make test-nightly`."""
