"""The verbs of `waker`, one module each: `arguments(parser)` and `run(args, environ) -> exit code`.

Parse, one call, print.
"""
