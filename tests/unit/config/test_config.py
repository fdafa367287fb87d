"""Config files, command lines and their mistakes."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.fileio.handlers.registry_utils import file_handlers

from opensora.config import config_to_text, load_config, parse_config
from opensora.config.choices import CONDITIONS
from opensora.config.commands import (
    CacheOptions,
    InferenceOptions,
    ServeOptions,
    TrainOptions,
    TrajectoryOptions,
    VaeInferenceOptions,
    VaeStatsOptions,
    VaeTrainOptions,
)
from opensora.config.help import topics_of
from opensora.config.keys import group_options, walk_options
from opensora.config.options import Options, PluginOptions, SamplingOption
from opensora.config.topics import Topic
from opensora.diffusion.conditions import get_spans
from opensora.utils.errors import Terminated, UserError

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs/diffusion/inference").glob("*.py"))
SCRIPTS = (InferenceOptions, TrainOptions, VaeTrainOptions, VaeInferenceOptions, VaeStatsOptions)
ALL_SCRIPTS = (*SCRIPTS, CacheOptions, ServeOptions, TrajectoryOptions)

INFERENCE = """
sampling_option = dict(resolution="256px", aspect_ratio="16:9", num_frames=129)
model = dict(type="flux", hidden_size=64, axes_dim=[4, 6, 6], grad_ckpt_settings=(1, 2))
ae = dict(type="hunyuan_vae", use_spatial_tiling=True)
plugin_config = dict(tp_size=1, further=1)
variable = 3
switch = False
nested = {"with-dash": {"deep": 1}}
words = ["a", "b"]
nothing = None
"""
TRAIN = """
lr = 1e-4
optim = dict(cls="HybridAdam", lr=lr)
model = dict(type="flux")
bucket_config = {"256px": {1: (1.0, 50), 33: (1.0, 4)}}
condition_config = dict(t2v=1, i2v_head=5)
"""


@pytest.fixture
def write(tmp_path):
    """Write a config file and give its path."""

    def write(text: str, name: str = "toy.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def infer(write):
    """Parse a command line of the inference script on the toy config."""
    path = write(INFERENCE)
    return lambda *words: parse_config([path, *words], InferenceOptions)


@pytest.fixture
def train(write):
    path = write(TRAIN, "toy_train.py")
    return lambda *words: parse_config([path, *words], TrainOptions)


# ---------------------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize(
    "words",
    [
        ["--save_dir", "out"],
        ["--save-dir", "out"],
        ["--save-dir=out"],
        ["--save_dir=out"],
    ],
)
def test_key_spellings(infer, words):
    assert infer(*words).save_dir == "out"


def test_config_may_come_last(write):
    assert parse_config(["--seed", "3", write(INFERENCE)], InferenceOptions).seed == 3


def test_dotted_keys_of_any_depth(infer, train):
    cfg = infer("--dataset.data-path", "a.csv", "--nested.with-dash.deep", "2", "--sampling-option.flow-shift=3")
    assert cfg.dataset.data_path == "a.csv"
    assert cfg.extra["nested"]["with-dash"]["deep"] == 2
    assert cfg.sampling_option.flow_shift == 3.0
    cfg = train("--bucket_config.256px.33", "(0.5, 2)", "--bucket_config.512px.1", "[1.0, 3]")
    assert cfg.bucket_config["256px"] == {1: (1.0, 50), 33: (0.5, 2)}
    assert cfg.bucket_config["512px"] == {1: [1.0, 3]}


def test_later_words_win(infer):
    assert infer("--seed", "1", "--seed", "2").seed == 2


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("word", "value"), [("True", True), ("false", False), ("1", True), ("no", False), ("on", True)]
)
def test_booleans(infer, word, value):
    assert infer("--offload", word).offload is value


def test_a_bare_switch_means_true(infer):
    cfg = infer("--offload", "--save-prefix", "x", "--switch", "--ae.use_temporal_tiling")
    assert cfg.offload is True
    assert cfg.extra["switch"] is True
    assert cfg.ae.use_temporal_tiling is True
    assert cfg.save_prefix == "x"


@pytest.mark.parametrize("words", [["--seed"], ["--prompt", "--seed", "3"], ["--variable"]])
def test_a_key_without_value(infer, words):
    with pytest.raises(UserError, match=rf"^{words[0]} needs a value"):
        infer(*words)


@pytest.mark.parametrize("text", ["42", "none", "True", "[1, 2]", 'a "quoted" word', "ends with, a comma"])
def test_texts_stay_texts(infer, text):
    assert infer("--prompt", text).prompt == text
    assert infer(f"--save_prefix={text}").save_prefix == text


def test_optional_keys_take_none(infer):
    cfg = infer("--sampling_option.resolution", "none", "--motion-score", "None", "--img_flux", "none")
    assert cfg.sampling_option.resolution is None
    assert cfg.motion_score is None
    assert cfg.img_flux is None


def test_numbers(infer):
    cfg = infer("--guidance", "7", "--num_steps", "1e1", "--motion_score", "4", "--sampling_option.seed", "-1")
    assert cfg.sampling_option.guidance == 7.0
    assert isinstance(cfg.sampling_option.guidance, float)
    assert cfg.sampling_option.num_steps == 10
    assert isinstance(cfg.sampling_option.num_steps, int)
    assert cfg.motion_score == "4"
    assert cfg.sampling_option.seed == -1


def test_values_that_start_with_dashes(infer):
    assert infer("--prompt=--wild").prompt == "--wild"
    assert infer("--prompt", "-x").prompt == "-x"
    assert infer("--prompt=a=b").prompt == "a=b"


@pytest.mark.parametrize("text", ["1,2,3", "[1, 2, 3]", "(1, 2, 3)", "1, 2, 3"])
def test_lists(infer, text):
    assert infer("--model.axes_dim", text).model.axes_dim == [1, 2, 3]


def test_tuples_and_alternatives(infer):
    assert infer("--model.grad_ckpt_settings", "8,100").model.grad_ckpt_settings == (8, 100)
    assert infer("--pretrained_lora_path", "a").pretrained_lora_path == "a"
    assert infer("--pretrained_lora_path", "a,b").pretrained_lora_path == ["a", "b"]
    assert infer("--pretrained_lora_path", "[a, b]").pretrained_lora_path == ["a", "b"]
    assert infer("--ae.scale_factor", "0.5").ae.scale_factor == 0.5
    assert infer("--ae.scale_factor", "0.5,1", "--ae.latent_channels", "2").ae.scale_factor == [0.5, 1.0]
    assert infer("--words", "c,d").extra["words"] == ["c", "d"]


def test_dicts(train):
    assert train("--condition_config", '{"t2v": 2}').condition_config == {"t2v": 2.0}
    assert train("--condition_config.i2v_tail", "2").condition_config["i2v_tail"] == 2.0
    assert train("--condition_config", "none").condition_config is None


def test_keys_that_only_the_file_defines(infer):
    cfg = infer("--variable", "4.5", "--nothing", "7")
    assert cfg.extra["variable"] == 4.5
    assert cfg.extra["nothing"] == 7


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num_steps", "many"], "--num_steps many: expected integer"),
        (["--num_steps", "1.5"], "--num_steps 1.5: expected integer"),
        (["--offload", "maybe"], "--offload maybe: expected true or false"),
        (["--guidance", "x"], "--guidance x: expected number"),
        (["--cond_type", "v2v_head_half"], "--cond_type v2v_head_half: expected one of t2v, i2v_head"),
        (["--model.grad_ckpt_settings", "8"], "expected 2 values"),
        (["--model", "big"], r"--model big: expected a section; .*--model.KEY"),
        (["--variable", "x"], "--variable x: expected integer"),
        (["--variable.x", "1"], "variable is a single value"),
        (["--dtype.x", "1"], "dtype is a single value"),
    ],
)
def test_wrong_types(infer, words, expected):
    with pytest.raises(UserError, match=expected):
        infer(*words)


# --------------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--promt", "--prompt"),
        ("--num-step", "--num_steps"),
        ("--sampling_option.num_step", "--sampling_option.num_steps"),
        ("--model.hiden_size", "--model.hidden_size"),
        ("--ae.use_spacial_tiling", "--ae.use_spatial_tiling"),
        ("--use_spatial_tiling", "--ae.use_spatial_tiling"),
        ("--plugin_config.spsize", "--plugin_config.sp_size"),
        ("--varable", "--variable"),
        ("--samplng_option.num_steps", "--sampling_option.num_steps"),
        ("--model.sp_size", "--plugin_config.sp_size"),
    ],
)
def test_unknown_keys_name_the_nearest(infer, flag, near):
    with pytest.raises(UserError, match=rf"^{flag} is not a known key; did you mean {near}\?"):
        infer(flag, "1")


@pytest.mark.parametrize("flag", ["--zzzzqqq", "--model.foo"])  # a section is not near its own keys
def test_unlike_anything(infer, flag):
    with pytest.raises(UserError, match=f"{flag} is not a known key; --help"):
        infer(flag, "1")


def test_stray_words(infer):
    with pytest.raises(UserError, match="'b' is neither"):
        infer("--ref", "a", "b")
    with pytest.raises(UserError, match="'-x' is neither"):
        infer("-x")


def test_no_config():
    with pytest.raises(UserError, match="no config"):
        parse_config(["--seed", "1"], InferenceOptions)


# --------------------------------------------------------------------------------------------------------------- files


def test_missing_file_names_the_nearest(write):
    path = write(INFERENCE, "256px.py")
    with pytest.raises(UserError, match=r"255px.py does not exist; did you mean .*256px.py"):
        parse_config([path.replace("256px", "255px")], InferenceOptions)
    with pytest.raises(UserError, match=r"does not exist$"):
        parse_config(["no/such/folder/256px.py"], InferenceOptions)


@pytest.mark.parametrize("text", ["model = (", "import no_such_module", "_base_ = ['gone.py']", "1 / 0"])
def test_broken_files(write, text):
    with pytest.raises(UserError, match=r"toy.py: cannot be read"):
        parse_config([write(text)], InferenceOptions)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("_base_ = ['toy.py']", r"toy.py: .*_base_ leads back .*\(toy.py -> toy.py\)"),
        ("_base_ = ['other.py']", r"toy.py: .*_base_ leads back .*\(toy.py -> other.py -> toy.py\)"),
        ("seed = 1\nseed = (", r"toy.py: cannot be read as a config: line 2: '\(' was never closed$"),
        ("_base_ = ['broken.py']", r"broken.py: cannot be read as a config: line 1: "),
        ("\ufeffseed = 1", "toy.py: .*byte order mark"),
    ],
)
def test_broken_files_are_named_themselves(write, text, said):
    """Not copies that the reader makes of them."""
    write("_base_ = ['toy.py']", "other.py")
    write("seed = = 1", "broken.py")
    with pytest.raises(UserError, match=said):
        parse_config([write(text)], InferenceOptions)


@pytest.mark.parametrize("text", ["raise Terminated", 'imports = ["ends"]'])
def test_sigterm_while_a_config_is_read_is_no_fault_of_it(write, text):
    first = "from opensora.utils.errors import Terminated\n"
    write(f"{first}raise Terminated", "ends.py")
    with pytest.raises(Terminated):
        parse_config([write(first * ("imports" not in text) + text)], InferenceOptions)


def test_yaml_is_data(write, tmp_path):
    """No tag of it makes an object, which would run code; mmengine is left as it was."""
    before = dict(file_handlers)
    path = write(f"seed: !!python/object/apply:pathlib.Path.mkdir [{tmp_path}/made]", "toy.yaml")
    with pytest.raises(UserError, match=r"toy.yaml: cannot be read as a config: ConstructorError"):
        parse_config([path], InferenceOptions)
    assert not (tmp_path / "made").exists()
    assert parse_config([write("seed: 7", "toy.yml")], InferenceOptions).seed == 7
    assert file_handlers == before


@pytest.mark.parametrize("text", ["{{1: 2}}", "{{...}}", "{[1]: 2}", "[" * 10_000])
def test_literals_that_cannot_be(train, text):
    with pytest.raises(UserError, match="--lora_config .*: expected dict or none"):
        train("--lora_config", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt = 'a\\0b'", "toy.py: prompt = .*: a text cannot hold a zero byte"),
        ("save_dir = 'a\\udcff'", "toy.py: save_dir = .*: not UTF-8"),
        ("pretrained_lora_path = ['a', 'b\\udcff']", "toy.py: pretrained_lora_path = .*: not UTF-8"),
        ('model = dict(type="flux", hiden_size=1)', "toy.py: model.hiden_size is not a known key.*model.hidden_size"),
        ("sampling_option = dict(num_step=1)", "toy.py: sampling_option.num_step is not.*sampling_option.num_steps"),
        ('sampling_option = dict(num_steps="50")', "toy.py: sampling_option.num_steps = '50': expected integer"),
        ('ae = dict(type="hunyuan_vea")', "toy.py: ae.type = 'hunyuan_vea'.*did you mean 'hunyuan_vae'"),
        ('model = dict(type="dc_ae")', "toy.py: model.type = 'dc_ae' is not possible here; expected flux"),
        ("model = dict(depth=1)", "toy.py: section model has no type; expected flux"),
        ('model = "flux"', "toy.py: model = 'flux': expected a section"),
        ("seed = 1.5", "toy.py: seed = 1.5: expected integer"),
        ("offload = 1", "toy.py: offload = 1: expected true or false"),
        ('num_frames = "x"', "toy.py: num_frames x: expected integer"),
    ],
)
def test_files_are_checked(write, text, expected):
    with pytest.raises(UserError, match=expected):
        parse_config([write(text)], InferenceOptions)


def test_files_keep_variables_and_open_sections(infer):
    cfg = infer()
    assert cfg.extra["variable"] == 3
    assert cfg.plugin_config == PluginOptions(tp_size=1, extra={"further": 1})
    assert cfg.plugin_config.to_dict() == {"tp_size": 1, "further": 1}


def test_ints_become_numbers(write):
    cfg = parse_config([write("sampling_option = dict(guidance=7)\nmotion_score = 4")], InferenceOptions)
    assert isinstance(cfg.sampling_option.guidance, float)
    assert cfg.motion_score == "4"


def test_bases_merge(write):
    write(INFERENCE, "base.py")
    child = write('_base_ = ["base.py"]\nmodel = dict(depth=1)\nae = dict(_delete_=True, type="dc_ae")', "child.py")
    cfg = parse_config([child], InferenceOptions)
    assert cfg.model.hidden_size == 64
    assert cfg.model.depth == 1
    assert cfg.ae.to_dict() == {"type": "dc_ae"}


def test_spatial_compression_of_old_files_is_ignored(write):
    cfg = parse_config([write("ae_spatial_compression = 32")], InferenceOptions)
    assert "ae_spatial_compression" not in cfg.to_dict()


def test_what_the_original_takes_and_nothing_needs_is_said_in_the_log(write, caplog):
    words = ["--ae_spatial_compression", "32", "--seed", "none"]
    cfg = parse_config([write(""), *words], InferenceOptions)
    assert "--ae_spatial_compression has no effect" in caplog.text
    assert "--seed none: the default is taken, 1024" in caplog.text
    assert cfg.seed == parse_config([write("seed = None")], InferenceOptions).seed == 1024
    assert "ae_spatial_compression" not in cfg.to_dict()
    with pytest.raises(UserError, match="--seed none: expected integer"):
        parse_config([write(""), "--seed", "none"], TrainOptions)


# ------------------------------------------------------------------------------------------------------------ defaults


def test_defaults_are_filled(infer):
    cfg = infer()
    assert set(group_options(InferenceOptions)) <= set(cfg.to_dict())
    assert cfg.dataset.type == "text"
    assert cfg.config_path.endswith("toy.py")
    option = cfg.sampling_option
    assert isinstance(option, SamplingOption)
    assert (option.resolution, option.num_frames, option.num_steps) == ("256px", 129, 50)


def test_defaults_are_not_shared():
    first = load_config({"model": {"type": "flux"}}, InferenceOptions)
    first.model.axes_dim.append(1)
    assert load_config({"model": {"type": "flux"}}, InferenceOptions).model.axes_dim == [16, 56, 56]
    with pytest.raises(FrozenInstanceError):
        first.seed = 2


def test_sections_made_by_the_command_line(write):
    cfg = parse_config(
        [write(""), "--model.depth", "2", "--ae.type", "dc_ae", "--ae.tile_overlap_factor", "0.5"], InferenceOptions
    )
    assert cfg.model.to_dict() == {"type": "flux", "depth": 2}
    assert cfg.ae.to_dict() == {"type": "dc_ae", "tile_overlap_factor": 0.5}
    with pytest.raises(UserError, match=r"no section ae; give --ae.type hunyuan_vae or dc_ae"):
        parse_config([write(""), "--ae.use_spatial_tiling"], InferenceOptions)


def test_type_is_set_before_its_keys(infer):
    with pytest.raises(UserError, match=r"ae.use_slicing is not a known key"):
        infer("--ae.use_slicing", "--ae.type", "dc_ae", "--ae.strict_load", "no")
    assert not infer("--ae.strict_load", "no", "--ae.type", "dc_ae").ae.strict_load


# ------------------------------------------------------------------------------------------------------------- aliases


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("resolution", "768px", "768px"),
        ("aspect_ratio", "9:16", "9:16"),
        ("num-frames", "97", 97),
        ("num_steps", "5", 5),
        ("guidance", "6", 6.0),
        ("guidance-img", "2.5", 2.5),
        ("flow_shift", "3", 3.0),
    ],
)
def test_sampling_aliases(infer, flag, text, value):
    assert getattr(infer(f"--{flag}", text).sampling_option, flag.replace("-", "_")) == value


def test_other_inference_aliases(infer):
    cfg = infer("--ckpt-path", "w.safetensors", "--offload_model", "True", "--prompt-refine", "--step-cache", "0.1")
    assert (cfg.sampling_option.step_cache, cfg.sampling_option.step_cache_threshold) == (None, 0.1)
    assert cfg.model.from_pretrained == "w.safetensors"
    assert cfg.offload is True
    assert cfg.refine_prompt is True
    assert infer("--offload", "True", "--refine-prompt", "True").refine_prompt is True


def test_aliases_in_a_file(write):
    path = write(INFERENCE + "num_frames = 5\noffload_model = True")
    cfg = parse_config([path], InferenceOptions)
    assert cfg.sampling_option.num_frames == 5
    assert cfg.offload is True
    assert parse_config([path, "--sampling_option.num_frames", "9"], InferenceOptions).sampling_option.num_frames == 9


def test_two_seeds(infer):
    cfg = infer("--seed", "1", "--sampling_option.seed", "2")
    assert (cfg.seed, cfg.sampling_option.seed) == (1, 2)


def test_vae_scripts_take_ckpt_path(write):
    path = write('model = dict(type="hunyuan_vae")')
    for options in (VaeTrainOptions, VaeInferenceOptions, VaeStatsOptions):
        assert parse_config([path, "--ckpt_path", "x"], options).model.from_pretrained == "x"


def test_lr_reaches_the_optimizer(train, write):
    assert (train().lr, train().optim.lr) == (1e-4, 1e-4)
    assert (train("--lr", "1e-5").lr, train("--lr", "1e-5").optim.lr) == (1e-5, 1e-5)
    cfg = train("--optim.lr", "1e-6")
    assert (cfg.lr, cfg.optim.lr) == (1e-6, 1e-6)
    write(TRAIN, "base.py")
    assert parse_config([write('_base_ = ["base.py"]\nlr = 5e-5', "child.py")], TrainOptions).optim.lr == 5e-5
    cfg = parse_config([write("optim = dict(lr=1)")], TrainOptions)
    assert (cfg.lr, cfg.optim.lr) == (1.0, 1.0)


def test_a_file_with_two_learning_rates_is_told(write, caplog):
    parse_config([write("lr = 1e-5\noptim = dict(lr=3e-5)")], TrainOptions)
    assert "lr = 1e-05 replaces optim.lr = 3e-05" in caplog.text


def test_disc_lr(write):
    path = write('optim_discriminator = dict(cls="HybridAdam", lr=1e-4)')
    assert parse_config([path, "--disc_lr", "2e-4"], VaeTrainOptions).optim_discriminator.lr == 2e-4
    assert parse_config([write(""), "--disc_lr", "2e-4"], VaeTrainOptions).optim_discriminator is None


# ---------------------------------------------------------------------------------------------------------- from Python


def test_load_config_takes_files_dicts_and_configs(write):
    content = {"model": {"type": "flux", "depth": 2}, "sampling_option": {"num_frames": 5}}
    overrides = {"sampling_option.num_frames": 9, "offload-model": True, "model": {"depth": 3}}
    for source in (content, Config(content)):
        cfg = load_config(source, InferenceOptions, overrides)
        assert (cfg.sampling_option.num_frames, cfg.offload) == (9, True)
        assert cfg.model.to_dict() == {"type": "flux", "depth": 3}
        assert source["model"]["depth"] == 2
        assert source["sampling_option"] == {"num_frames": 5}
    assert load_config(Path(write(INFERENCE)), InferenceOptions).extra["variable"] == 3


def test_a_resolved_config_may_be_loaded_again(infer):
    cfg = infer("--guidance", "3")
    assert load_config(cfg, InferenceOptions).to_dict() == cfg.to_dict()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"num_stepz": 3}, "num_stepz is not a known key; did you mean num_steps"),
        ({"seed": "3"}, "seed 3: expected integer"),
        ({"model": {"type": "flux", "detph": 3}}, "model.detph is not a known key"),
        (["seed"], r"overrides \['seed'\]: give a dict"),
        ({3: 4}, "overrides {3: 4}: give a dict"),
    ],
)
def test_load_config_mistakes(overrides, expected):
    with pytest.raises(UserError, match=expected):
        load_config({}, InferenceOptions, overrides)


def test_config_to_text(infer):
    text = config_to_text(infer("--prompt", "é"))
    assert json.loads(text)["sampling_option"]["num_frames"] == 129
    assert '\n    "prompt": "é"' in text


# ---------------------------------------------------------------------------------------------------------------- help


def unwrapped(text: str) -> str:
    """A help text with a line per key."""
    return re.sub(r"\n {9,}", " ", text)


@pytest.mark.parametrize("options", SCRIPTS)
def test_help_lists_every_key(capsys, options):
    with pytest.raises(SystemExit) as status:
        parse_config(["--help"], options)
    assert not status.value.code
    text = unwrapped(capsys.readouterr().out)
    for dotted, option, _ in walk_options(options, None):
        assert re.search(rf"^  --{re.escape(dotted)} +{re.escape(option.metadata['help'])}", text, re.M), dotted
    for alias, target in options.aliases.items():
        assert re.search(rf"^  --{alias} +--{target}$", text, re.M)


def test_help_knows_nested_keys_of_every_type(capsys):
    with pytest.raises(SystemExit):
        parse_config(["-h"], InferenceOptions)
    text = unwrapped(capsys.readouterr().out)
    for key in (
        "sampling_option.flow_shift",
        "model.hidden_size",
        "ae.use_slicing",
        "ae.encoder.width_list",
        "ae.ch_mult",
    ):
        assert f"--{key} " in text
    assert re.search(r"--fps_save .*\[integer, frames/s; 16\]", text)


def test_help_with_a_config_shows_its_values(infer, capsys):
    with pytest.raises(SystemExit):
        infer("--help")
    text = unwrapped(capsys.readouterr().out)
    assert re.search(r"--model.hidden_size .*; 64\]", text)
    assert "ae.* with type dc_ae" not in text
    assert re.search(r"^  --variable +\[3\]$", text, re.M)


@pytest.mark.parametrize("options", ALL_SCRIPTS)
@pytest.mark.parametrize(("columns", "most"), [("", 100), ("70", 70), ("300", 100)])
def test_help_fits_the_terminal(capsys, monkeypatch, options, columns, most):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        parse_config(["--help"], options)
    lines = capsys.readouterr().out.splitlines()
    assert most - 10 < max(map(len, lines)) <= most


@pytest.mark.parametrize("options", ALL_SCRIPTS)
def test_help_is_grouped_by_purpose(capsys, options):
    with pytest.raises(SystemExit):
        parse_config(["--help"], options)
    lines = capsys.readouterr().out.splitlines()
    headings = [line.removesuffix(":") for line in lines if line.removesuffix(":") in list(Topic)]
    used = dict(topics_of(options))
    assert used.keys() == group_options(options).keys()
    assert headings == [topic for topic in Topic if topic in used.values()]
    assert max(Counter(used.values()).values()) <= 20, "a heading over so many keys helps nobody"


@pytest.mark.parametrize("options", ALL_SCRIPTS)
def test_every_group_says_what_its_first_key_is_for(options):
    groups = [base for base in options.__mro__ if issubclass(base, Options) and base is not Options]
    for group in groups:
        inherited = {name for base in group.__mro__[1:] for name in vars(base).get("__annotations__", ())}
        own = [name for name in vars(group)["__annotations__"] if name not in inherited]
        keys = [option for name, option in group_options(group).items() if name in own]
        assert not keys or "topic" in keys[0].metadata, f"{group.__name__}.{keys[0].name}"


@pytest.mark.parametrize("options", SCRIPTS)
def test_every_key_has_help_and_a_default_of_its_type(options):
    for dotted, option, _ in walk_options(options, None):
        assert 0 < len(option.metadata["help"]) < 100, dotted
        assert "\n" not in option.metadata["help"]
    for alias, target in options.aliases.items():
        assert alias not in group_options(options)
        assert target in {dotted for dotted, _, _ in walk_options(options, None)}


@pytest.mark.parametrize("options", SCRIPTS)
def test_defaults_pass_their_own_check(options):
    types = {"model": "flux" if options in (InferenceOptions, TrainOptions) else "hunyuan_vae"}
    defaults = {name: option.default for name, option in group_options(options).items() if not option.is_section}
    load_config({**defaults, "model": {"type": types["model"]}}, options)


PASSED_ON = {"initial_scale"}  # keys that go to ColossalAI's plugin as they are


@pytest.mark.parametrize("options", SCRIPTS)
def test_a_key_that_nothing_reads_says_so(options):
    files = [path for folder in ("opensora", "scripts") for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text("utf-8") for path in files if not path.stem.startswith("schema"))
    # an attribute, a string, or an argument or field of that name
    read = {*re.findall(r"""[."'](\w+)""", code), *re.findall(r"\b(\w+)(?:: |=)", code), *PASSED_ON}
    for dotted, option, _ in walk_options(options, None):
        if not {"also", "no_effect"} & set(option.metadata):
            assert option.name in read, f"{dotted} does nothing"


def test_keys_of_old_configs_that_do_nothing_are_told(write, caplog, capsys):
    path = write(TRAIN)
    parse_config([path, "--num_bucket_build_workers", "8", "--plugin_config.enable-sequence-parallelism"], TrainOptions)
    assert "--num_bucket_build_workers has no effect: one process sorts a million rows in seconds" in caplog.text
    assert "--plugin_config.enable-sequence-parallelism has no effect: sp_size above 1 does it" in caplog.text
    with pytest.raises(SystemExit):
        parse_config([path, "--help"], TrainOptions)
    assert "no effect: it always follows from the config and the step" in unwrapped(capsys.readouterr().out)


# -------------------------------------------------------------------------------------------------------- exit status


def test_mistakes_exit_with_status_2(write):
    code = (
        "from opensora.config import parse_config, run_main\n"
        "from opensora.config.commands import InferenceOptions\n"
        "run_main(lambda argv: parse_config(argv, InferenceOptions))\n"
    )
    script = write(code, "script.py")
    words = [sys.executable, script, write(INFERENCE), "--promt", "a cat"]
    done = subprocess.run(words, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: --promt is not a known key; did you mean --prompt?"
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------ shipped configs


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_inference_configs_parse(path):
    cfg = parse_config([str(path), "--prompt", "rain on the sea", "--offload", "True"], InferenceOptions)
    assert cfg.model.type == "flux"
    assert None not in (cfg.ae, cfg.t5, cfg.clip)


def test_high_compression_replaces_the_autoencoder_and_the_plugins():
    cfg = load_config(ROOT / "configs/diffusion/inference/high_compression.py", InferenceOptions)
    assert cfg.plugin is None
    assert cfg.plugin_config == PluginOptions()
    assert (cfg.ae.type, cfg.model.patch_size, cfg.patch_size) == ("dc_ae", 1, 1)
    assert "latent_channels" not in cfg.ae.given
    assert cfg.sampling_option.num_frames == 128
    assert cfg.sampling_option.resolution == "768px"
    assert cfg.use_t2i2v


def test_plugins_of_the_large_configs():
    folder = ROOT / "configs/diffusion/inference"
    cfg = load_config(folder / "t2i2v_768px.py", InferenceOptions)
    assert (cfg.plugin, cfg.plugin_config.sp_size, cfg.plugin_config_ae.tp_size) == ("hybrid", 8, 8)
    assert cfg.img_flux.guidance_embed
    cfg = load_config(folder / "256px_tp.py", InferenceOptions, {"plugin_config.tp_size": 2})
    assert (cfg.plugin_config.tp_size, cfg.plugin_config.sp_size) == (2, 1)


def test_condition_types_are_those_of_the_table():
    assert all(isinstance(get_spans(name), tuple) for name in CONDITIONS)
