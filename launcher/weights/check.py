"""Whether a folder holds the weights of the model that is to be trained; asked before anything is started, and again by every host."""

from launcher.models.config import ModelConfig
from launcher.models.hf import HFTensor
from launcher.models.registry import FAMILIES
from launcher.weights.folder import ModelFolder, WeightsError
from launcher.weights.safetensors_format import TYPES, StoredTensor

_EMBEDDING = "embed_tokens.weight"


def check_weights(model: ModelConfig, endpoint: str | None = None) -> ModelFolder | None:
    """The folder of `model.weights`, None where none is set. `endpoint`: as for ModelFolder. Raises WeightsError."""
    if model.weights is None:
        return None
    folder = ModelFolder(model.weights, endpoint)
    _check_shape(model, folder)
    stored_tensors(model, folder)
    return folder


def stored_tensors(model: ModelConfig, folder: ModelFolder) -> list[tuple[HFTensor, StoredTensor]]:
    """Every tensor of the model with its place in the folder. Raises WeightsError when one is missing or of another shape or type."""
    prefix = _prefix(folder)
    found = []
    for tensor in FAMILIES[model.family].hf_tensors(model.shape):
        name = prefix + tensor.name.removeprefix("model.")
        stored = folder.tensors.get(name)
        if stored is None:
            raise WeightsError(f"model.weights {folder.url}: tensor {name} is missing, which {model.variant} has; copy the folder again")
        if stored.shape != tensor.file_shape:
            raise WeightsError(
                f"model.weights {folder.url}: tensor {name} is {list(stored.shape)}, {model.variant} has {list(tensor.file_shape)}; "
                "choose the model.variant of these weights"
            )
        if stored.type not in TYPES:
            raise WeightsError(f"model.weights {folder.url}: tensor {name} is of type {stored.type}; known are {', '.join(TYPES)}")
        found.append((tensor, stored))
    return found


def _check_shape(model: ModelConfig, folder: ModelFolder) -> None:
    try:
        theirs = FAMILIES[model.family].hf_shape(folder.config)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"model.weights {folder.url}: config.json is of no known {model.family}: {error}") from error
    ours = vars(model.shape)
    different = [f"{name} {value} where {model.variant} has {ours[name]}" for name, value in theirs.items() if ours[name] != value]
    if different:
        raise WeightsError(
            f"model.weights {folder.url}: its config.json says {'; '.join(different)}; choose the model.variant of these weights"
        )


def _prefix(folder: ModelFolder) -> str:
    """What stands before the names: "model." for text models; the multimodal ones have had two others."""
    names = [name for name in folder.tensors if name.endswith(_EMBEDDING)]
    if len(names) != 1:
        raise WeightsError(f"model.weights {folder.url}: expected one tensor ...{_EMBEDDING}, found {len(names)}; copy the folder again")
    return names[0].removesuffix(_EMBEDDING)
