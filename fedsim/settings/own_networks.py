"""Networks that `model=` names as code in the place of an option, in every way that it may be said.

    net.py:Net                      a class or function of a file, which is run
    mymodels:Net, mymodels.Net      of a module of the working folder
    torchvision.models.resnet18     without weights

To Hydra each is an option of the group `model` (`config_files.py`).
"""

from __future__ import annotations

from fedsim.settings.groups import Settings

IN_FILE = "fedsim.models.own_file.network"
SCHEME = "code"
TORCHVISION = "torchvision.models."
# A head that only training has is no part of what is judged.
WITH_TWO_HEADS = (f"{TORCHVISION}googlenet", f"{TORCHVISION}inception_v3")
FORMS = "a class of your own is FILE.py:CLASS or MODULE:CLASS, a network of torchvision torchvision.models.NAME"


def is_file(name: str) -> bool:
    """Returns whether a name is one of a network in a file."""
    return name.endswith(".py") or name.rpartition(":")[0].endswith(".py")


def network_settings(name: str) -> Settings | None:
    """Returns the settings of a network that is named as code; None for what can be the name of an option only."""
    if is_file(name):
        return {"_target_": IN_FILE, "_partial_": True, "source": name}
    target = name.replace(":", ".", 1)
    if "." not in target or not all(part.isidentifier() for part in target.split(".")):
        return None
    settings: Settings = {"_target_": target, "_partial_": True}
    return {**settings, "aux_logits": False} if target in WITH_TWO_HEADS else settings
