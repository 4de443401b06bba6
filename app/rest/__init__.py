"""The HTTP API: each module is a resource, on top of `requests` and `problems`.

Resources read and write tables like any other client of the database. A new resource is a module
here, with its routes listed in app/application.py and its operations in `openapi`.
"""
