"""The clients that people use, in an environment of their own, against a real server.

`python -m load_tests.clients` is `make clients`. The files `with_*.py` run inside that environment:
they import one client each and, of this project, only what stands in this folder.
"""
