# SPDX-License-Identifier: Apache-2.0
"""Every save is a release: a folder that works where this package is not installed, and can be saved again.

`save_pretrained` and `push_to_hub` of model and processor, and whatever calls them (`Trainer.save_model`, a pipeline,
a SentenceTransformer), leave beside the weights:

    *.py                    this code, flat
    config.json             `auto_map` for the Auto classes, `custom_pipelines` for `pipeline(...)`
    processor_config.json   and the tokenizer; a model saved alone takes them from where it was loaded
    modules.json            and config_sentence_transformers.json, for `SentenceTransformer(...)`

transformers copies the file of a class and what that imports relatively, found by a regular expression, also inside
functions. So the imports of `_classes` make every copy of this file bring all others along, also to the cache of
remote code, where this file then runs.
"""

import filecmp
import json
import math
import re
import shutil
from pathlib import Path

from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, logging

from .captions import CUSTOM, STREAMS


logger = logging.get_logger(__name__)

# "zero-shot-image-classification" is the Hub's own name for the nearest task: snippets, widget and clients know it.
# `pipeline` looks for a task among those of the configuration first.
TASKS = ("video-text-retrieval", "zero-shot-image-classification")
# Small files that a push uploads with whatever was saved, also if they were in the folder before.
SMALL_FILES = re.compile(
    r".+\.(py|model|jinja)|(merges|vocab)\.txt|modules\.json|config_sentence_transformers\.json"
    r"|(processor_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
)
IS_REMOTE = __name__.startswith("transformers_modules.")
SOURCE_OPTIONS = ("revision", "subfolder", "cache_dir", "local_files_only", "zero_shot")  # no token: it is a secret


def _classes() -> tuple[dict[str, type], type, type]:
    """{Auto class: ours}, the pipeline, the sentence-transformers module. Late: these modules import this one."""
    from .configuration_camoe import CAMoEConfig
    from .modeling_camoe import CAMoEModel
    from .pipeline_camoe import CAMoEPipeline
    from .processing_camoe import CAMoEProcessor
    from .sentence_camoe import CAMoESentenceModule
    from .video_processing_camoe import CAMoEVideoProcessor

    by_auto_class = {
        "AutoConfig": CAMoEConfig,
        "AutoModel": CAMoEModel,
        "AutoProcessor": CAMoEProcessor,
        "AutoVideoProcessor": CAMoEVideoProcessor,
    }
    return by_auto_class, CAMoEPipeline, CAMoESentenceModule


def _reference(cls: type) -> str:
    """As a flat repository names a class: "module.Class"."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def register(config):
    """Name the classes of this code in a configuration that is about to be saved: `auto_map`, `custom_pipelines`.

    `pipeline` has replaced the names in `custom_pipelines` by classes, if it loaded this configuration.
    """
    by_auto_class, pipeline_class, _ = _classes()
    config.auto_map = {name: _reference(cls) for name, cls in by_auto_class.items()}
    config.custom_pipelines = {task: {"impl": _reference(pipeline_class), "pt": ["AutoModel"]} for task in TASKS}


def write_code(folder: Path):
    """Copy this code, flat. An equal file stays as it is, so that an upload of what changed leaves it out."""
    for source in {__file__, *get_relative_import_files(__file__)}:
        target = folder / Path(source).name
        if not target.is_file() or not filecmp.cmp(source, target, shallow=False):
            shutil.copyfile(source, target)


def write_sentence_files(folder: Path):
    """Write the two files by which SentenceTransformer recognises a checkpoint, if there are none."""
    _, _, module_class = _classes()
    module = {"idx": 0, "name": "0", "path": "", "type": _reference(module_class)}
    config = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "dot",  # the score; cosine would divide by the length that the gate gives a vector
    }
    for name, content in (("modules.json", [module]), ("config_sentence_transformers.json", config)):
        if not (folder / name).is_file():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class SavesRelease:
    """Mixin before a class of transformers that can be saved and pushed: every save completes the folder."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        register(self.config)
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        if self._saves_here(*args, **kwargs):
            self._complete(Path(save_directory))
        return saved

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        """Called at the end of `save_pretrained` if it pushes: what is added after it would come too late."""
        self._complete(Path(working_dir))
        known = {name: time for name, time in files_timestamps.items() if not SMALL_FILES.fullmatch(name)}
        return super()._upload_modified_files(working_dir, repo_id, known, *args, **kwargs)

    def _saves_here(self, *args, **kwargs) -> bool:
        return True

    def _complete(self, folder: Path):
        write_code(folder)
        write_sentence_files(folder)


class SavesProcessor(SavesRelease):
    """The processor's half: it is made from a model's configuration, and saves that where there is none.

    A configuration that is already there is the model's. It stays as it is, and must be one that the processor fits.
    """

    def save_pretrained(self, save_directory, *args, **kwargs):
        if not self._has_model(save_directory):
            register(self.config)
            self.config.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        where = {name: kwargs[name] for name in ("token", "revision") if kwargs.get(name) is not None}
        # Only what is newer than this is uploaded.
        files_timestamps = files_timestamps | {CONFIG_NAME: math.inf if self._has_model(repo_id, **where) else 0.0}
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)

    def _has_model(self, place, **where) -> bool:
        """Whether a folder or repository has a configuration.

        Raises:
            ValueError: it is that of another model.
        """
        config_class = _classes()[0]["AutoConfig"]
        try:
            config, _ = PreTrainedConfig.get_config_dict(place, **where)
        except OSError:
            config = None
        if not config:
            return False
        if config.get("model_type") != config_class.model_type:
            raise ValueError(f"{place} holds a {config.get('model_type')!r} model: save the processor elsewhere.")
        self.check(config_class.from_dict(config))
        return True


class SavesModel(SavesRelease):
    """The model's half: it remembers where it was loaded from, and takes the processor from there."""

    _loaded_from = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        options = {name: kwargs[name] for name in SOURCE_OPTIONS if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        if pretrained_model_name_or_path is not None:
            model._loaded_from = (str(pretrained_model_name_or_path), options)
        return loaded

    def _saves_here(self, is_main_process: bool = True, *args, **kwargs) -> bool:
        return self.should_save_on_this_rank(is_main_process)

    def _complete(self, folder: Path):
        if not (folder / PROCESSOR_NAME).is_file():
            self._save_processor(folder)
        super()._complete(folder)

    def _save_processor(self, folder: Path):
        try:
            if self._loaded_from is None:
                raise OSError("the model was made, not loaded")
            name, options = self._loaded_from
            # Remote code of that place is what runs here: it was trusted before.
            loaded = _classes()[0]["AutoProcessor"].from_pretrained(name, trust_remote_code=IS_REMOTE, **options)
        except (ImportError, OSError, ValueError) as error:  # no files, no connection, no library for the tokenizer
            logger.warning(
                f"{folder} has no processor yet, so nothing but the model loads from it. Save one beside it: "
                f"`processor.save_pretrained({str(folder)!r})`. Where the model comes from, there is none "
                f"({type(error).__name__}: {error})."
            )
            return
        # Experts may have been chosen when the model was loaded: the processor follows.
        tagger, unknown = loaded.tagger, sorted(set(self.config.streams.values()) - set(STREAMS))
        if unknown and tagger != "none" and not str(tagger).startswith(CUSTOM):  # a custom one knows its own streams
            logger.warning(
                f"The tagger {tagger!r} makes no stream {', '.join(unknown)}: the processor in {folder} has none, and "
                "every expert reads the whole caption. Save a processor with your own tagger beside the model first."
            )
            tagger = "none"
        processor = type(loaded)(loaded.video_processor, loaded.tokenizer, self.config, tagger, loaded.max_length)
        processor.save_pretrained(folder)


__all__ = ["SavesModel", "SavesProcessor", "SavesRelease"]
