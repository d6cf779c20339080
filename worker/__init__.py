"""What runs in the image: a drainer, a listener, and the parent that starts both and ends with the drainer's code.

Nothing here is a public Python API: use the `worker` command. The package stays importable next to a module of the
user's own that has the same name; see `worker/aside.py`.
"""
