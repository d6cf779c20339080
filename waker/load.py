"""`module:name` → the object, with the working directory first on the path and an error that says which half failed."""

import importlib
import os
import sys
import traceback

from .errors import LoadError

__all__ = ["load"]


def load(spec: str, *, directory: str | None = None) -> object:
    """Import *spec*, like `myapp.tasks:queue`, and return what it names.

    *directory* (the working directory unless given) comes first on the path, and stays there: the module may import its
    neighbours late. Raises LoadError: not of that form; module not found; name not in the module; or the module itself
    raised, with the place in the user's code.
    """
    module_name, colon, name = spec.partition(":")
    if not (colon and _is_dotted(module_name) and _is_dotted(name)):
        raise LoadError(f"{spec!r}: expected module:name, like myapp.tasks:queue")
    directory = os.getcwd() if directory is None else directory
    if sys.path[:1] != [directory]:
        sys.path.insert(0, directory)
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise LoadError(
                f"{spec!r}: there is no module {missing!r} in {directory} or elsewhere on the path"
            ) from None
        raise LoadError(f"{spec!r}: the module raised while it was imported: {_where(error)}") from error
    except SystemExit as error:
        raise LoadError(f"{spec!r}: the module ended the program while it was imported ({error!r})") from error
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise LoadError(f"{spec!r}: {module_name} has no {name!r}{_similar(part, found)}") from None
    return found


def _is_dotted(text: str) -> bool:
    return bool(text) and all(part.isidentifier() for part in text.split("."))


def _where(error: Exception) -> str:
    """The error in one line, with the last place in the code that was being imported."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    # The import machinery's own frames, and ours, say nothing to the reader.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename][1:]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {said}" if frames else said


def _similar(name: str, found: object) -> str:
    from difflib import get_close_matches

    names = get_close_matches(name, [known for known in dir(found) if not known.startswith("_")], n=3)
    return f"; it has {', '.join(names)}" if names else ""
