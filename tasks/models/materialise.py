"""Makes the model of the settings a local folder of safetensors, once; everything else reads that folder."""

import importlib.metadata
import shutil
from pathlib import Path

from tasks.contracts.files import digest_of_files, only_one, publish_folder, write_json
from tasks.contracts.settings import ModelSettings
from tasks.models.identity import EMBEDDED_WHEEL, ModelNotFound, check_model, embedded_gguf, is_folder


def materialise(settings: ModelSettings, storage: Path) -> Path:
    """The local folder of the model; converts or downloads it under ``storage/models`` the first time.

    Raises:
        ModelNotFound: the model is not there, or the hub cannot be reached.
    """
    check_model(settings)
    if settings.name == "embedded":
        return _embedded(storage / "models")
    if is_folder(settings.name):
        return Path(settings.name).expanduser().resolve()
    return _from_hub(settings, storage / "models" / "hub")


def weights_digest(folder: Path) -> str:
    """SHA-256 over the model's weight files: the proof that training left the original as it was."""
    return digest_of_files(folder.glob("*.safetensors"), folder)


def _embedded(models: Path) -> Path:
    final = models / f"smollm2-135m-instruct-{importlib.metadata.version(EMBEDDED_WHEEL)}"
    if (final / "manifest.json").exists():
        return final
    # All ranks of all jobs may come here at once: the first converts, the others wait for it.
    with only_one(models / ".embedded.lock"):
        if not (final / "manifest.json").exists():
            _convert(embedded_gguf(), final)
    return final


def _convert(gguf: Path, final: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.models.load import quiet_loading

    quiet_loading()
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loaded weights are plain float32; what says otherwise would make save_pretrained refuse.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    write_json(temporary / "manifest.json", {"source": gguf.name, "weights_sha256": weights_digest(temporary)})
    publish_folder(temporary, final)


def _from_hub(settings: ModelSettings, cache: Path) -> Path:
    """The hub's library locks its cache file by file; in HOME it would be each node's or each pod's own."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = snapshot_download(
            settings.name,
            revision=settings.revision,
            cache_dir=cache,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelNotFound(
            f"model.name={settings.name!r} cannot be had from the hub: {type(error).__name__}: {error}\n"
            "Check the name and revision, HF_TOKEN for gated models, and the network; or give a local folder, "
            "or 'embedded'"
        ) from error
    if not list(Path(folder).glob("*.safetensors")):
        raise ModelNotFound(f"model.name={settings.name!r}: the hub holds no *.safetensors for it; others are refused")
    return Path(folder)
