"""Our errors, as another process hands them on."""

from __future__ import annotations

from lorasb_export.errors import ArtifactError, MissingPackageError, OutputError, ServerError, some_problems


def test_errors_survive_pickling() -> None:
    import pickle

    for kind in (ArtifactError, OutputError, MissingPackageError, ServerError):  # with what is built in beside ours
        error = kind("bad", where="here", fix="Do this")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.__dict__) == (kind, "bad (here). Do this", error.__dict__)
        error.silent = True
        assert pickle.loads(pickle.dumps(error)).silent


def test_of_many_problems_the_rarest_are_named() -> None:
    classifiers = {f"c{number}": ArtifactError("a classifier", where=f"c{number}", fix="") for number in range(30)}
    damaged = {name: ArtifactError(f"{name} is torn", fix="Fetch it") for name in ("x", "y")}
    lines = some_problems({**classifiers, **damaged}).splitlines()
    assert lines[:3] == ["  x: x is torn. Fetch it", "  y: y is torn. Fetch it", "  c0: a classifier (c0)"]
    assert (len(lines), lines[-1]) == (11, "  and 22 more")
    assert some_problems(damaged).splitlines() == lines[:2]
