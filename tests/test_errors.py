"""Our errors, as another process hands them on."""

from __future__ import annotations

from lorasb_export.errors import ArtifactError, MissingPackageError, OutputError, ServerError


def test_errors_survive_pickling() -> None:
    import pickle

    for kind in (ArtifactError, OutputError, MissingPackageError, ServerError):  # with what is built in beside ours
        error = kind("bad", where="here", fix="Do this")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.__dict__) == (kind, "bad (here). Do this", error.__dict__)
        error.silent = True
        assert pickle.loads(pickle.dumps(error)).silent
