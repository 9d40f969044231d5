"""The server: populations, tasks, rounds and releases behind HTTP, in one process, on SQLite and a folder.

`app` puts it together; `api` speaks HTTP; `rounds` moves the rounds; `intake` adds contributions up; `store`
holds the named transactions; `blobs` the bytes.
"""
