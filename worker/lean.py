"""Imports supervisor without what only its HTTP server, its configuration file and its log files need.

All of it takes 80 ms of CPU before anything can be started, and 18 MB for as long as the machine is up; this takes 40
and 11. `supervisor.compat` imports both ends of XML-RPC for names that we never call, so empty modules stand in for
what lies behind them, as long as the import lasts. A supervisor that wants more of them than these gets the real ones.
"""

import sys
from importlib import import_module
from types import ModuleType

__all__ = ["import_supervisor"]

# What supervisor 4.3 touches of each while it is imported, or while its options are made.
STAND_INS = {
    "configparser": ("RawConfigParser",),
    "getopt": (),
    "glob": (),
    "hashlib": ("md5", "sha1"),
    "html": ("escape",),
    "html.entities": (),
    "html.parser": ("HTMLParser",),
    "http.client": (),
    "importlib.metadata": ("EntryPoint",),
    "importlib.resources": (),
    "platform": (),
    "supervisor.xmlrpc": (),
    "tempfile": ("gettempdir",),
    "urllib.parse": (),
    "xmlrpc.client": ("Fault",),
}
WANTED = ("supervisor.supervisord", "supervisor.process")


def import_supervisor() -> None:
    """Import supervisor, so that later imports of it find it. Nobody else may be importing meanwhile."""
    absent = [name for name in STAND_INS if name not in sys.modules]
    for name in absent:
        sys.modules[name] = module = ModuleType(name)
        for attribute in STAND_INS[name]:
            setattr(module, attribute, type(attribute, (), {}))
    try:
        for name in WANTED:
            import_module(name)
    except (ImportError, AttributeError):
        # Another version of it, half of which is imported by now. The next import begins again, with the real ones.
        for name in list(sys.modules):
            if name == "supervisor" or name.startswith("supervisor."):
                del sys.modules[name]
    finally:
        for name in absent:
            sys.modules.pop(name, None)
