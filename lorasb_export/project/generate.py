"""Which adapters of a project are asked where nobody names any."""

from __future__ import annotations

from ..choices import CAUSAL_LM
from ..errors import ArtifactError
from ..format import read_adapter_config
from ..names import ours_in, refuse_many
from .project import Project


def adapters_to_ask(project: Project) -> tuple[list[str], list[str]]:
    """Names: of the adapters that generate, and of the classifiers, which answer nothing.

    One that cannot be read is among the former: who loads it says so.

    Raises:
        SettingsError: there are more adapters than one question should go to.
    """
    names = ours_in(project.adapters_folder)
    refuse_many(names, project.folder)
    generating, classifiers = list[str](), list[str]()
    for name in names:
        try:
            generates = read_adapter_config(project.adapter_folder(name))["task_type"] == CAUSAL_LM
        except ArtifactError:
            generates = True
        (generating if generates else classifiers).append(name)
    return generating, classifiers
