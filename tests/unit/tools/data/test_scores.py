"""Text in the picture, CLIP scores, duplicates, thresholds and captions."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from opensora.utils.errors import UserError
from opensora.utils.video import save_image, save_video
from tools.data.engine.decode import PixelWorker
from tools.data.sample_footage import pan, texture, titled
from tools.data.stages.caption import Caption, CaptionOptions, LocalModel, clean_caption
from tools.data.stages.clip_scores import (
    Aesthetic,
    AestheticOptions,
    ClipFeatures,
    ClipOptions,
    Match,
    MatchOptions,
    load_head,
)
from tools.data.stages.duplicates import Duplicates, DuplicatesOptions, close_features, close_hashes
from tools.data.stages.filters import Filter, FilterOptions
from tools.data.stages.frames import FrameSamples, FramesOptions
from tools.data.stages.ocr import Ocr, OcrOptions

ROOT = Path(__file__).parents[4]


# --------------------------------------------------------------------------------------------------------------- text


def test_text_is_read_and_texture_is_not(tmp_path):
    pytest.importorskip("rapidocr")
    plain = texture(120, 240, 1)
    save_image(plain, tmp_path / "plain.png")
    save_image(titled(plain[None], "SUBSCRIBE NOW")[0], tmp_path / "text.png")
    stage = Ocr(OcrOptions(), tmp_path)
    stage.check()
    work = stage.worker()
    (without,) = work({"frame_paths": ["plain.png"]})
    (with_text,) = work({"frame_paths": ["text.png"]})
    assert without == {"text_area": 0.0, "text_found": ""}
    assert 0.05 < with_text["text_area"] < 0.5
    assert "SUBSCRIBE" in with_text["text_found"].upper()


# --------------------------------------------------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP with the tokenizer that comes with the repository."""
    from transformers import CLIPConfig, CLIPModel

    source = ROOT / "assets" / "demo" / "openai" / "clip-demo"
    if not (source / "config.json").is_file():
        pytest.skip("no CLIP tokenizer at hand")
    folder = tmp_path_factory.mktemp("clip")
    for file in source.iterdir():
        if file.name != "config.json" and file.suffix in (".json", ".txt"):
            (folder / file.name).write_bytes(file.read_bytes())
    words = json.loads((source / "config.json").read_text())
    words = words.get("text_config", words)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": words["vocab_size"], "eos_token_id": words.get("eos_token_id", 2)}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_features_aesthetic_and_match(tmp_path, clip_folder):
    for number in range(2):
        save_image(texture(40, 60, number), tmp_path / f"{number}.png")
    stage = ClipFeatures(ClipOptions(path=str(clip_folder)), tmp_path)
    stage.check()
    work = stage.worker()
    (one,), (two,), (both,) = (work({"frame_paths": paths}) for paths in (["0.png"], ["1.png"], ["0.png", "1.png"]))
    assert np.linalg.norm(one["clip_features"]) == pytest.approx(1, abs=1e-5)
    assert both["clip_features"] == pytest.approx(
        (np.add(one["clip_features"], two["clip_features"]) / 2).tolist(), abs=1e-5
    )

    head = {"layers.0.weight": torch.randn(4, 8), "layers.0.bias": torch.randn(4)}
    head |= {"layers.2.weight": torch.randn(1, 4), "layers.2.bias": torch.randn(1)}
    torch.save(head, tmp_path / "head.pth")
    scores = Aesthetic(AestheticOptions(head=str(tmp_path / "head.pth")), tmp_path).worker()
    middle = head["layers.0.weight"] @ torch.tensor(one["clip_features"]) + head["layers.0.bias"]
    expected = head["layers.2.weight"] @ middle + head["layers.2.bias"]
    assert scores(one)[0]["aesthetic"] == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(UserError, match="takes 8 features, the CLIP model of clip.path gives 3"):
        load_head(tmp_path / "head.pth")(np.zeros(3))

    match = Match(MatchOptions(path=str(clip_folder)), tmp_path).worker()
    values = [match({**one, "text": text})[0]["match"] for text in ("a red circle", "a blue square moving up")]
    assert all(-100 <= value <= 100 for value in values)
    assert values[0] != values[1]
    with pytest.raises(UserError, match="no caption"):
        match({**one, "text": ""})


@pytest.fixture
def other_models(tmp_path, clip_folder):
    """Folders that hold something else than a whole CLIP, by what they lack."""
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**small, vocab_size=9)).save_pretrained(tmp_path / "bert")
    CLIPVisionModel(CLIPVisionConfig(**small, image_size=32, patch_size=16)).save_pretrained(tmp_path / "vision")
    state = load_file(clip_folder / "model.safetensors")
    cuts = {
        "no projection": lambda name: not name.startswith("visual_projection"),
        "half": lambda name: "layers.0.mlp" not in name,
        "text": lambda name: name.startswith("text"),
    }
    for folder in (*cuts, "no weights", "damaged", "no config", "bin"):
        shutil.copytree(clip_folder, tmp_path / folder)
    for folder, keep in cuts.items():
        save_file({k: v for k, v in state.items() if keep(k)}, tmp_path / folder / "model.safetensors")
    (tmp_path / "no weights" / "model.safetensors").unlink()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\0" * 50)
    (tmp_path / "no config" / "config.json").write_text("{")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save({k: v for k, v in state.items() if not k.startswith("vision")}, tmp_path / "bin" / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("bert", r"--clip.path .*bert: a model of type 'bert', not CLIP .*hf download"),
        ("vision", r"a model of type 'clip_vision_model', not CLIP"),
        ("no projection", r"its weights lack visual_projection.weight; hf download"),
        ("text", r"its weights lack vision_model.*in all"),
        ("half", r"its weights lack vision_model.encoder.layers.0.mlp"),
        ("no weights", r"no weights there \(model.safetensors is missing\)"),
        ("damaged", r"model.safetensors is damaged: "),
        ("no config", r"config.json is damaged"),
        ("bin", r"its weights lack vision_model.*in all"),
    ],
)
def test_another_model_is_not_taken_for_clip(other_models, folder, message):
    stage = ClipFeatures(ClipOptions(path=str(other_models / folder)), other_models)
    with pytest.raises(UserError, match=message) as error:
        stage.check()
    assert "\n" not in str(error.value)


def test_a_clip_without_its_text_half_does_for_pictures_only(other_models, clip_folder):
    from safetensors.torch import load_file, save_file

    state = load_file(clip_folder / "model.safetensors")
    folder = other_models / "text"
    save_file({k: v for k, v in state.items() if k.startswith("vis")}, folder / "model.safetensors")
    ClipFeatures(ClipOptions(path=str(folder)), other_models).worker()
    with pytest.raises(UserError, match=r"--match.path .*its weights lack text_model"):
        Match(MatchOptions(path=str(folder)), other_models).check()
    shutil.copy(clip_folder / "model.safetensors", folder)
    for name in ("tokenizer.json", "vocab.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="no tokenizer there"):
        Match(MatchOptions(path=str(folder)), other_models).check()


def test_missing_weights_say_how_to_get_them(tmp_path):
    with pytest.raises(UserError, match=r"no CLIP weights: hf download openai/clip-vit-large-patch14"):
        ClipFeatures(ClipOptions(), tmp_path).check()
    with pytest.raises(UserError, match=r"--match.path nowhere: no model there"):
        Match(MatchOptions(path="nowhere"), tmp_path).check()
    with pytest.raises(UserError, match=r"no weights: download sac\+logos"):
        Aesthetic(AestheticOptions(), tmp_path).check()
    (tmp_path / "head.pth").write_text("no head")
    with pytest.raises(UserError, match="is not an aesthetic head"):
        load_head(tmp_path / "head.pth")


# --------------------------------------------------------------------------------------------------------- duplicates


def test_reencoded_clips_are_duplicates(tmp_path):
    big, small = pan(texture(240, 400, 1), (120, 200), 12, x=1), pan(texture(240, 400, 2), (120, 200), 12, x=1)
    save_video(big[:, ::2, ::2], tmp_path / "a.mp4", 24, crf=34)
    save_video(big, tmp_path / "b.mp4", 24, crf=20)
    save_video(small, tmp_path / "c.mp4", 24, crf=20)
    worker = PixelWorker([FrameSamples(FramesOptions(), tmp_path)])
    rows = [worker({"clip_id": name, "clip_path": f"{name}.mp4"}, ["frames"])["frames"] for name in "abc"]
    table = pl.DataFrame(
        {
            "clip_id": list("abc"),
            "phash": [r["phash"] for r in rows],
            "height": [60, 120, 120],
            "width": [100, 200, 200],
        }
    )
    found = Duplicates(DuplicatesOptions(), tmp_path).run_table(table)
    assert found["duplicate_of"].to_list() == ["b", None, None]
    assert found["keep"].to_list() == [False, True, True]
    assert found["reason"].to_list() == ["duplicate", "", ""]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("height", [90, 120, 90]),
        ("num_frames", [48, 96, 47]),
        ("bpp", [0.1, 0.2, None]),
        ("source_fps", [24, 30, None]),
    ],
)
def test_the_best_of_duplicates_stays(tmp_path, column, values):
    """Resolution counts first, then length, then bit rate; all that counts more is equal here, all else worse."""
    order = ["height", "num_frames", "bpp", "source_fps"]
    facts = {"height": [120] * 3, "num_frames": [48] * 3, "bpp": [0.3, 0.1, 0.3], "source_fps": [30.0, 24.0, 30.0]}
    better = {name: facts[name] for name in order[order.index(column) + 1 :]} if column != "bpp" else {}
    columns = {"height": [120] * 3, "num_frames": [48] * 3, "bpp": [0.1] * 3, "source_fps": [24.0] * 3}
    columns |= {**better, column: values}
    table = pl.DataFrame(
        {
            "clip_id": list("abc"),
            "phash": [["f" * 16]] * 3,
            "width": [200] * 3,
            "fps": [24.0] * 3,
            "source_height": [1080] * 3,
            "source_width": [1920] * 3,
            **columns,
        }
    )
    for rows in (table, table.reverse()):
        found = Duplicates(DuplicatesOptions(), tmp_path).run_table(rows)
        assert found.filter("keep")["clip_id"].to_list() == ["b"]
        assert set(found.filter(~pl.col("keep"))["duplicate_of"]) == {"b"}


def test_no_clip_is_no_duplicate(tmp_path):
    """A run in which every clip failed before, with features asked for."""
    kinds = {"clip_id": pl.String, "phash": pl.List(pl.String), "height": pl.Int32, "width": pl.Int32}
    table = pl.DataFrame(schema={**kinds, "clip_features": pl.List(pl.Float32)})
    assert Duplicates(DuplicatesOptions(), tmp_path).run_table(table).height == 0


@pytest.mark.parametrize("distance", [3.0, 6.0, 7.0, 10.0])
def test_close_hashes_are_all_found(distance):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (60, 3), np.uint64)
    for row in range(30):  # neighbours at growing distance
        flips = np.array(
            [sum(1 << int(b) for b in rng.choice(63, row // 3, replace=False)) for _ in range(3)], np.uint64
        )
        hashes[row] = hashes[59 - row] ^ flips
    found = {tuple(sorted(pair)) for pair in close_hashes(hashes, distance)}
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None]).mean(-1)
    assert found == {(a, b) for a in range(60) for b in range(a + 1, 60) if bits[a, b] <= distance}
    assert len(found) > 5


def test_close_features():
    features = np.array([[1, 0], [0, 1], [1, 0.1], [0.1, 2]], np.float32)
    assert sorted(close_features(features, 0.98)) == [(0, 2), (1, 3)]


# ------------------------------------------------------------------------------------------------------------- filter


def judge(tiers, keep=None) -> pl.DataFrame:
    table = pl.DataFrame({"x": [0.0, 5.0, 9.0, None], "y": [1.0, 1.0, 2.0, 1.0]})
    stage = Filter(FilterOptions(tiers=tiers, keep=keep), Path())
    stage.check()
    return stage.run_table(table)


def test_tiers():
    tiers = {"base": {"x": [1, None]}, "fine": {"x": [None, 8], "y": [None, 1.5]}}
    found = judge(tiers)
    assert found["keep"].to_list() == [False, True, True, True]
    assert found["reason"].to_list() == ["x < 1", "", "", ""]
    assert found["tier"].to_list() == [None, "fine", "base", "fine"]
    found = judge(tiers, keep="fine")
    assert found["reason"].to_list() == ["x < 1", "", "x > 8", ""]


def test_wrong_thresholds_are_named():
    with pytest.raises(UserError, match=r"filter.tiers.base.x = \[1\]: expected \[lowest or None, highest or None\]"):
        judge({"base": {"x": [1]}})
    with pytest.raises(UserError, match=r"expected \[lowest"):
        judge({"base": {"x": [2, 1]}})
    with pytest.raises(UserError, match=r"filter.keep = 'best' is none of the tiers base"):
        judge({"base": {"x": [1, None]}}, keep="best")
    with pytest.raises(UserError, match=r"has no filter.tiers"):
        judge({})
    words = pl.DataFrame({"codec": ["h264"]})
    with pytest.raises(UserError, match=r"filter.tiers: column 'codec' is String; thresholds are for numbers"):
        Filter(FilterOptions(tiers={"base": {"codec": [1, 2]}}), Path()).run_table(words)


# ------------------------------------------------------------------------------------------------------------ caption


@pytest.fixture
def server():
    """An endpoint that keeps what it was asked; ``replies`` are its answers (a number is an error status)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": []}, 200)

        def do_POST(self):
            httpd.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = httpd.replies.pop(0)
            usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
            message = {"role": "assistant", "content": reply}
            body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage}
            body["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
            self.answer(body, reply if isinstance(reply, int) else 200)

        def answer(self, body, status):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *arguments):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.replies = [], []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def caption(tmp_path, **settings) -> Caption:
    for number in range(4):
        save_image(texture(20, 30, number), tmp_path / f"{number}.png")
    stage = Caption(CaptionOptions(**{"timeout": 5.0, **settings}), tmp_path)
    stage.check()
    return stage


ROW = {"frame_paths": [f"{number}.png" for number in range(4)], "camera_motion": "pan left"}


@pytest.mark.parametrize("kind", [Ocr, ClipFeatures, Caption])
def test_pictures_of_other_settings_are_looked_at_anew(tmp_path, kind):
    """Larger pictures of the same frames have the same hashes."""
    stage = kind(kind.options()(), tmp_path)
    small, large = ({"clip_id": "a", "phash": ["f" * 16], "frame_paths": [path]} for path in ("s.jpg", "l.jpg"))
    assert stage.key(small) != stage.key(large)


def test_caption_from_an_endpoint(tmp_path, server):
    server.replies = ["The video shows **a cat** that\nwalks."]
    stage = caption(tmp_path, base_url=server.url, template="motion", model="m", frames=2)
    (row,) = stage.worker()(ROW)
    assert row == {"text": "A cat that walks.", "tokens_in": 10, "tokens_out": 5}
    (asked,) = server.asked
    text, *pictures = asked["messages"][0]["content"]
    assert "measured as: pan left" in text["text"]
    assert len(pictures) == 2
    assert pictures[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert (asked["model"], asked["max_tokens"]) == ("m", 300)
    assert stage.reads == stage.identity == ("clip_id", "frame_paths", "camera_motion")


def test_caption_is_tried_again_and_then_fails(tmp_path, server):
    server.replies = [503, "A dog."]
    worker = caption(tmp_path, base_url=server.url, attempts=2).worker()
    assert worker(ROW)[0]["text"] == "A dog."
    server.replies = [503, 429]
    with pytest.raises(Exception, match="429"):
        worker(ROW)
    server.replies = ["  "]
    with pytest.raises(UserError, match="no caption"):
        worker(ROW)


@pytest.fixture
def vision_model(tmp_path):
    """A tiny random Llava that knows four words."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {
        word: number for number, word in enumerate(["<unk>", "<image>", "<s>", "</s>", "a", "cat", "dog", "walks"])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks: dict = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    marks["additional_special_tokens"] = ["<image>"]
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
    )
    hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=template,
    ).save_pretrained(tmp_path / "llava")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 8, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 3}
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**small, image_size=32, patch_size=16),
        text_config=hf.LlamaConfig(**small, **ids, num_key_value_heads=2),
        image_token_index=1,
        vision_feature_layer=-1,
    )
    hf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    return str(tmp_path / "llava")


def test_caption_from_a_local_model(tmp_path, vision_model):
    stage = caption(tmp_path, local=vision_model, max_tokens=3)
    assert stage.concurrency == 0
    pictures = [Image.fromarray(texture(20, 30, number)) for number in range(2)]
    text, tokens_in, tokens_out = LocalModel(vision_model, "cpu", max_tokens=3)("a cat walks", pictures)
    assert tokens_in == 2 * 4 + 3  # four patches per picture, three words
    assert 1 <= tokens_out <= 3
    assert set(text.split()) <= {"a", "cat", "dog", "walks"}


def test_half_a_local_model_is_refused(tmp_path, vision_model):
    from safetensors.torch import load_file, save_file

    file = Path(vision_model) / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "vision" not in k}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"--caption.local .*its weights lack .*vision"):
        LocalModel(vision_model, "cpu", 3)
    file.write_bytes(b"x")
    with pytest.raises(UserError, match=r"--caption.local .*cannot be loaded"):
        LocalModel(vision_model, "cpu", 3)


def test_endpoint_down_or_not_given(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"caption endpoint http://127.0.0.1:9/v1/: Connection error. Is the server running"
    ):
        caption(tmp_path, base_url="http://127.0.0.1:9/v1").worker()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="set OPENAI_API_KEY, or give --caption.base_url"):
        caption(tmp_path)  # before anything runs


def test_wrong_caption_settings(tmp_path):
    with pytest.raises(UserError, match="'medium' is none of short, long, motion"):
        caption(tmp_path, template="medium")
    with pytest.raises(UserError, match=r"caption.template: .*braces"):
        caption(tmp_path, template="Describe { this")
    with pytest.raises(UserError, match=r"caption.template: \{\} names no column"):
        caption(tmp_path, template="Describe {} this")
    with pytest.raises(UserError, match=r"--caption.base_url localhost:8000: expected http://HOST:PORT/v1"):
        caption(tmp_path, base_url="localhost:8000")
    with pytest.raises(UserError, match=r"--caption.local nowhere: no model there .* hf download"):
        caption(tmp_path, local="nowhere")
    assert caption(tmp_path, local="org/name").weights() == []  # of a hub: it is looked for when it is loaded


def test_cost_is_counted(tmp_path, caplog):
    stage = caption(tmp_path, base_url="http://x", price_in=2.0, price_out=10.0)
    table = pl.DataFrame({"tokens_in": [500_000, None], "tokens_out": [100_000, None]})
    with caplog.at_level("INFO", logger="opensora"):
        stage.finish(table)
    assert "1 texts, 500000 tokens read, 100000 written, cost 2.00" in caplog.text


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("In this video, a dog runs.", "A dog runs."),
        ("Sure! Here is a description of the video: The clip depicts a boat.", "A boat."),
        ('"A **bold** `word` and a [link](http://x.y)"', "A bold word and a link"),
        ("- one\n- two https://a.b/c", "One two"),
        ("The videographer walks.", "The videographer walks."),
        ("A sign reads SNAKE_CASE.", "A sign reads SNAKE_CASE."),
    ],
)
def test_cleaning(answer, text):
    assert clean_caption(answer) == text
