"""How every exercise is judged: run the reader's function, compare with the solution, and name the mistake that was made."""

import copy

import numpy as np


def judge(attempt, inputs, solution, mistakes: dict, right: str, rtol: float = 1e-5) -> bool:
    """Print what is wrong with the reader's function, or that it is right; return whether it is.

    attempt: the reader's function; a stub returns None or Ellipsis.  inputs: tuples of arguments, tried in turn.
    solution: the right function of the same arguments; it returns numbers: a scalar, a tuple of them, an array or a tensor.
    mistakes: {sentence: function of the same arguments}, the typical wrong ways, each with the sentence that helps.
    right: the sentence after "right: ".  rtol: allowed difference relative to the largest number of the solution.
    """
    results, first = [], None  # first: the number of the first input whose result is wrong
    for number, arguments in enumerate(inputs):
        try:
            got = attempt(*copy.deepcopy(arguments))
        except NotImplementedError:
            got = None
        except Exception as error:  # whatever the reader's code does, say it
            if first is not None:
                break
            return _say(False, f"your code stops with {type(error).__name__}: {error}")
        if got is None or got is Ellipsis:
            return _say(False, "not attempted yet: replace the dots, and return the result")
        got, expected = _numbers(got), _numbers(solution(*copy.deepcopy(arguments)))
        if got is None:
            return _say(False, f"the result must be numbers like the solution's, shape {expected.shape}")
        results.append((got, expected))
        if first is None and not _same(got, expected, rtol):
            first = number
    if first is not None:
        return _say(False, _difference(*results[first], _reason(results, first, inputs, mistakes, rtol)))
    return _say(True, f"right: {right}")


def judge_value(answer, expected, mistakes: dict, right: str, rtol: float = 1e-5) -> bool:
    """As `judge`, for an answer that is a value and not a function; mistakes: {sentence: value}."""
    wrong = {sentence: (lambda value=value: value) for sentence, value in mistakes.items()}
    return judge(lambda: answer, [()], lambda: expected, wrong, right, rtol)


def _say(verdict: bool, sentence: str) -> bool:
    print(sentence)
    return verdict


def _numbers(result) -> np.ndarray | None:
    """The result as an array of numbers or booleans, None if it is something else."""
    try:
        array = np.asarray(result.detach().cpu() if hasattr(result, "detach") else result)
    except (TypeError, ValueError):
        return None
    return array if array.dtype.kind in "biufc" else None


def _result(wrong, arguments) -> np.ndarray | None:
    """What a typical mistake yields; None where these arguments do not admit it (shapes that do not fit, say)."""
    try:
        return _numbers(wrong(*copy.deepcopy(arguments)))
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError):
        return None


def _reason(results, first: int, inputs, mistakes: dict, rtol: float) -> str | None:
    """The sentence of the mistake that explains all results, else of one that explains the first wrong one."""

    def explains(wrong, number: int) -> bool:
        return _same(results[number][0], _result(wrong, inputs[number]), rtol)

    everything = (s for s, wrong in mistakes.items() if all(explains(wrong, number) for number in range(len(results))))
    return next(everything, next((s for s, wrong in mistakes.items() if explains(wrong, first)), None))


def _same(a: np.ndarray, b: np.ndarray | None, rtol: float) -> bool:
    if b is None or a.shape != b.shape:
        return False
    largest = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))  # an overflow is a mistake too, and may be recognised
    return np.allclose(a, b, rtol=rtol, atol=rtol * largest, equal_nan=True)


def _difference(got: np.ndarray, expected: np.ndarray, reason: str | None) -> str:
    if got.shape != expected.shape:
        fault = f"the shape is {got.shape}, it should be {expected.shape}"
    elif got.ndim == 0:
        fault = f"{got} is not it"
    else:
        fault = "right shape, wrong numbers"
        if reason is None:
            worst = np.unravel_index(np.argmax(np.abs(got * 1.0 - expected)), got.shape)
            fault += f"; the worst is at index {tuple(map(int, worst))}, where you have {got[worst]:.6g}"
    return fault if reason is None else f"{fault}: {reason}"
