"""What errors say."""

import pickle

from ghost_core import (
    CaptureError,
    GhostError,
    MissingExtraError,
    UnbalancedError,
    UnknownNameError,
    WrongSplitError,
    errors,
)


def test_every_error_is_a_ghost_error() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    assert all(issubclass(kind, GhostError) for kind in kinds if issubclass(kind, Exception))


def test_an_unknown_name_lists_what_exists_and_guesses() -> None:
    message = str(UnknownNameError("projection", "gausian", ["rademacher", "gaussian"], "Hint."))
    assert message == (
        "unknown projection 'gausian'; did you mean 'gaussian'? Available: gaussian, rademacher. "
        "Hint."
    )


def test_long_lists_are_cut() -> None:
    message = str(UnknownNameError("layer", "?", [f"l{at:02}" for at in range(50)]))
    assert "l39 and 10 more." in message
    message = str(UnknownNameError("layer", "?", map(str, range(10, 62)), "Hint.", most=2))
    assert message == "unknown layer '?'. Hint. Available: 10, 11 and 50 more."
    assert "none" in str(UnknownNameError("layer", "?", []))


def test_a_missing_extra_says_how_to_get_it() -> None:
    error = MissingExtraError("pandas", "ghost-engines[pandas]", "to_pandas()")
    assert str(error) == (
        "to_pandas() needs pandas, which is not installed: pip install 'ghost-engines[pandas]'"
    )
    assert isinstance(error, ImportError)


def test_what_reason_and_remedy_take_a_line_each() -> None:
    error = WrongSplitError("It is wrong", reason="it is so.", remedy="mend it")
    assert str(error) == "It is wrong\nReason: it is so.\nRemedy: mend it"
    assert (error.what, error.reason, error.remedy) == ("It is wrong", "it is so.", "mend it")
    assert str(CaptureError("It is wrong", remedy="mend it")) == "It is wrong\nRemedy: mend it"
    assert str(UnbalancedError("It is wrong", reason="why")) == "It is wrong\nReason: why."


def test_errors_cross_processes() -> None:
    for error in (
        GhostError("a"),
        UnbalancedError("a", reason="b", remedy="c"),
        UnknownNameError("layer", "a", ["b"]),
        MissingExtraError("a", "b", "c"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)
