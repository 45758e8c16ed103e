"""What makes tests quicker and changes nothing that they see. To be imported before PyTorch.

Coverage is measured of our code alone, yet while it is, all of Python takes half as long again. So it is not while others' modules are
imported, while the compiler reads our code, or inside the words of Triton's language. Lines and branches found are the same.
"""

import contextlib
import functools
import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

OURS = f"{Path(__file__).parent.parent}{os.sep}"
OTHERS = f"{os.sep}site-packages{os.sep}"  # which may lie in a .venv among ours


@contextlib.contextmanager
def untraced():
    """No coverage is measured inside."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)
        (lambda: None)()  # at the first call the tracer is back as a whole: it would miss the end of functions otherwise


def made_untraced(function):
    """The function, inside which no coverage is measured."""

    @functools.wraps(function, updated=())
    def called(*arguments, **options):
        if sys.gettrace() is None:
            return function(*arguments, **options)
        with untraced():
            return function(*arguments, **options)

    return called


def import_untraced() -> None:
    """Others' modules; ours run as before."""
    load = SourceFileLoader.exec_module
    load_untraced = made_untraced(load)

    def loaded(loader, module):
        is_ours = loader.path.startswith(OURS) and OTHERS not in loader.path
        return (load if is_ours else load_untraced)(loader, module)

    SourceFileLoader.exec_module = loaded


def rewrite_untraced() -> None:
    """pytest puts into the assertions of tests what they say when they fail; it keeps that where Python may keep what it compiles."""
    try:
        from _pytest.assertion import rewrite

        rewrite._rewrite_test = made_untraced(rewrite._rewrite_test)
    except (ImportError, AttributeError):  # no pytest, or another one
        return


def compile_untraced() -> None:
    """The compiler reads our code as data."""
    try:
        from torch._dynamo.convert_frame import CatchErrorsWrapper
    except ImportError:  # another PyTorch
        return
    CatchErrorsWrapper.__call__ = made_untraced(CatchErrorsWrapper.__call__)


def interpret_quickly() -> None:
    """Triton's interpreter looks through all of triton.language at every call from one function of a kernel to another.

    That is half its time, and changes nothing after the first look of a launch: what it replaces then stays replaced until the launch ends.
    Another third goes into the types of tiles and what tiles know of their shapes, made anew for every number: within a launch each is
    made once.
    """
    try:
        from triton.language import core
        from triton.runtime import interpreter

        launch, look, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang, interpreter._patch_attr
        type_made, tile_made, number_of = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    except (ImportError, AttributeError):  # no Triton, or another one
        return
    looked, types, shapes, numbers = {}, {}, {}, {}

    def launched(executor, *arguments, **options):
        kept = (looked, types, shapes, numbers)
        for each in kept:
            each.clear()
        try:
            return launch(executor, *arguments, **options)
        finally:
            for each in kept:
                each.clear()

    def looked_at(function):
        module = id(function.__globals__)
        if module not in looked:
            looked[module] = look(function)
        return looked[module]

    def init_type(self, element_ty, shape):
        key = id(element_ty), tuple(shape)
        if key not in types:
            type_made(self, element_ty, shape)
            types[key] = dict(vars(self))  # which holds the element's type: its id remains its own
        vars(self).update(types[key])

    def init_tile(self, handle, type):
        shape = type.shape if type.is_block() else None
        if id(shape) in shapes:
            vars(self).update(shapes[id(shape)][0], handle=handle, type=type, dtype=type.scalar)
            return
        tile_made(self, handle, type)
        if vars(self).keys() == {"handle", "type", "dtype", "shape", "numel"}:
            shapes[id(shape)] = dict(shape=self.shape, numel=self.numel), shape  # whose id remains its own

    def number(of):
        of = of.scalar
        if id(of) not in numbers:
            numbers[id(of)] = number_of(of), of
        return numbers[id(of)][0]

    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = init_type, init_tile, number
    interpreter.GridExecutor.__call__, interpreter._patch_lang = launched, looked_at
    interpreter._patch_attr = lambda place, name, word, *more: replace(place, name, made_untraced(word), *more)


import_untraced()
