"""What people give by mistake, and what each gets; the rows of docs/reliability/bad_input.md.

UPDATE_TABLE=1 python -m pytest tests/test_bad_input.py    # writes the table anew
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import icc_profiles
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.command_line import parse, run
from gsoft_diffusion.foundation import memory
from gsoft_diffusion.training import preflight
from gsoft_diffusion.training.train import train

TABLE = Path(__file__).resolve().parent.parent / "docs" / "reliability" / "bad_input.md"
HEAD = """# Bad input

Written by `tests/test_bad_input.py`, which also checks that it is current. An error is one line on stderr
with exit status 2, and nothing is written. A run that continues says in one line what it did with the input.

| input | what is said |
|---|---|
"""
ROWS: list[str] = []
P3 = icc_profiles.rgb("Display P3", icc_profiles.DISPLAY_P3)


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if os.environ.get("UPDATE_TABLE"):
        TABLE.write_text(HEAD + "".join(ROWS), encoding="utf-8")


@pytest.fixture(autouse=True)
def place(base, photos, tmp_path, monkeypatch) -> Path:
    """A working directory with `photos` and the model `base`, so that messages hold no other paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "notes.txt").unlink()
    Path("base").symlink_to(base)
    return tmp_path


def command(*options: str) -> list[str]:
    """Options of a run of one step, with further ones."""
    which = "--pretrained_model_name_or_path base --output_dir out"
    which += "" if "--concepts_list" in options else " --instance_data_dir photos --class_word dog"
    quick = "--nblocks 4 --max_train_steps 1 --train_batch_size 1 --num_validation_images 0 --report_to none"
    return [*which.split(), *quick.split(), "--num_inference_steps", "2", *options]


def row(name: str, message: str) -> str:
    """The table's row: without numbers of this machine's libraries and addresses in memory."""
    message = re.sub(r"0x[0-9a-f]+", "0x…", message).replace("|", r"\|")
    return f"| {name} | {message} |\n"


def check_row(name: str, message: str) -> None:
    ROWS.append(row(name, message))
    if not os.environ.get("UPDATE_TABLE"):
        assert row(name, message) in TABLE.read_text(encoding="utf-8"), "the table is not current, see this file's head"


def everything(folder: Path) -> dict[str, bytes | None]:
    """The folder's files by their paths; of links only that they are there."""
    paths = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in paths}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(7).integers(0, 255, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


@dataclass(frozen=True)
class Case:
    """name: the input in words. prepare: makes it, in the working directory. options, environment: of the command."""

    name: str
    prepare: Callable[[], object] = lambda: None
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def photo(name: str, write: Callable[[Path], object]) -> Callable[[], object]:
    return lambda: write(Path("photos") / name)


def empty(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir()


def only_one() -> None:
    for path in list(Path("photos").iterdir())[1:]:
        path.unlink()


def truncated(path: Path) -> None:
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def own_base(change: Callable[[Path], object]) -> Callable[[], object]:
    """A copy of the model that `change` gets its folder of."""

    def prepare() -> None:
        source = Path("base").resolve()
        Path("base").unlink()
        shutil.copytree(source, "base")
        change(Path("base"))

    return prepare


def set_config(part: str, **values: object) -> Callable[[], object]:
    def change(folder: Path) -> None:
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return own_base(change)


def other_text_encoder(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = json.loads((folder / "text_encoder" / "config.json").read_text())
    CLIPTextModel(CLIPTextConfig(**settings | {"hidden_size": 16})).save_pretrained(folder / "text_encoder")


def cut_weights(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def concepts(*settings: dict[str, str]) -> Callable[[], object]:
    return lambda: Path("concepts.json").write_text(json.dumps(settings))


def transparent_black(path: Path) -> None:
    image = Image.new("RGBA", (40, 40))
    image.paste((0, 0, 0, 255), (10, 10, 30, 30))
    image.save(path)


def one_photo_of_two() -> None:
    Path("photos/1_mug").mkdir()
    noise(20, 20).save("photos/1_mug/mug.png")
    concepts(
        {"instance_data_dir": "photos", "class_word": "dog"},
        {"instance_data_dir": "photos/1_mug", "class_word": "mug", "unique_token": "zwx"},
    )()


def own_class_image(name: str, source: str) -> Callable[[], object]:
    def prepare() -> None:
        Path("class").mkdir()
        shutil.copy(source, Path("class") / name)

    return prepare


def drawn_before() -> None:
    Path("class").mkdir()
    told = PngInfo()
    told.add_text("gsoft_diffusion", json.dumps({"prompt": "a photo of a cat", "base_model": {"fingerprint": "x"}}))
    noise(32, 32).save("class/seed000000.png", pnginfo=told)


def another_run(*names: str) -> Callable[[], object]:
    def prepare() -> None:
        for name in names:
            path = Path("out") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")

    return prepare


def black_and_white_on_transparent(path: Path) -> None:
    image = Image.new("RGBA", (40, 40))
    image.paste("black", (0, 0, 40, 30))
    image.paste("white", (10, 10, 30, 20))
    image.save(path)


def mask_as_it_lies() -> None:
    exif(Path("photos/5.jpg"))
    Image.new("L", (40, 30), 255).save("photos/5-masklabel.png")


def only_folders() -> None:
    Path("photos").rename("dog")
    Path("photos").mkdir()
    Path("dog").rename("photos/dog")


def two_subjects(write: Callable[[Path], object], word: str = "mug", token: str = "zwx") -> Callable[[], object]:
    def prepare() -> None:
        Path("mugs").mkdir()
        noise(21, 20).save("mugs/mug.png")
        write(Path("mugs"))
        concepts(
            {"instance_data_dir": "photos", "class_word": "dog"},
            {"instance_data_dir": "mugs", "class_word": word, "unique_token": token},
        )()

    return prepare


def lora() -> None:
    save_file({"lora_unet_a.lora_up.weight": torch.zeros(2, 2)}, "lora.safetensors")


LISTED = ("--concepts_list", "concepts.json")
PRIOR = ("--with_prior_preservation", "--class_data_dir", "class", "--num_class_images", "1")

ERRORS = [
    Case("no such folder", lambda: shutil.rmtree("photos")),
    Case("an empty folder", lambda: empty("photos")),
    Case("a folder of folders", only_folders),
    Case("a truncated picture", photo("5.png", truncated)),
    Case("a file of no bytes", photo("5.jpg", Path.touch)),
    Case("another file with a picture's name", photo("5.jpg", lambda path: path.write_text("Dear diary"))),
    Case("a file that cannot be read", photo("5.jpg", lambda path: path.symlink_to("/proc/self/mem"))),
    Case("one pixel", photo("5.png", noise(1, 1).save)),
    Case("20,000 × 20,000 pixels", photo("5.png", lambda path: Image.new("1", (20_000, 20_000)).save(path))),
    Case(
        "an animation",
        photo(
            "5.webp", lambda path: noise(40, 40).save(path, save_all=True, append_images=[Image.new("RGB", (40, 40))])
        ),
    ),
    Case("32 bits a channel", photo("5.tiff", Image.new("F", (40, 40)).save)),
    Case("a mask of one shade", photo("0-masklabel.png", Image.new("L", (40, 40), 128).save)),
    Case("a mask that is black on transparent", photo("0-masklabel.png", transparent_black)),
    Case(
        "a mask that is black and white on transparent",
        photo("0-masklabel.png", black_and_white_on_transparent),
    ),
    Case("a mask that is not turned as its photo is", mask_as_it_lies),
    Case("a mask in colours", photo("0-masklabel.png", noise(40, 40).save)),
    Case("a caption in two files", lambda: (Path("photos/0.txt").write_text("a"), Path("photos/0.caption").touch())),
    Case("captions in no encoding of Unicode", photo("0.txt", lambda path: path.write_bytes(b"gr\xfc\xdfe"))),
    Case("a table with semicolons", photo("metadata.csv", lambda path: path.write_text("file_name;text\n0.png;a\n"))),
    Case(
        "a table of texts with commas and no quotes",
        photo("metadata.csv", lambda path: path.write_text("file_name,text\n0.png,a sks dog, asleep\n")),
    ),
    Case("one photo of two subjects", one_photo_of_two, LISTED),
    Case(
        "a caption that names another subject",
        two_subjects(lambda to: (to / "mug.txt").write_text("a sks dog")),
        LISTED,
    ),
    Case("a token that is another subject's class word", two_subjects(Path.exists, token="dog"), LISTED),
    Case(
        "one folder for two classes",
        concepts(
            {"instance_data_dir": "photos", "class_word": "dog", "class_data_dir": "class"},
            {"instance_data_dir": "x", "class_word": "mug", "unique_token": "zwx", "class_data_dir": "./class/"},
        ),
        LISTED,
    ),
    Case("a photo among the class images", own_class_image("a.png", "photos/1.png"), PRIOR),
    Case("class images that were drawn for another prompt", drawn_before, PRIOR),
    Case(
        "the photos as class images",
        options=("--with_prior_preservation", "--class_data_dir", "photos", "--num_class_images", "2"),
    ),
    Case(
        "class images among the photos",
        options=("--with_prior_preservation", "--class_data_dir", "photos/1_dog", "--num_class_images", "2"),
    ),
    Case("an empty prompt", options=("--instance_prompt", " ")),
    Case("no class word and no prompt", options=("--class_word", "")),
    Case("a unique token that is the class word", options=("--unique_token", "Dog")),
    Case(
        "a unique token that the prompt does not have",
        options=("--unique_token", "zwx", "--instance_prompt", "a photo of a sks dog"),
    ),
    Case(
        "a placeholder for a name that is not known",
        options=("--instance_prompt", "a photo of my dog", "--validation_prompts", "a {0} {1} in the snow"),
    ),
    Case("a learning rate that is no number", options=("--learning_rate", "nan")),
    Case("an infinite learning rate", options=("--learning_rate", "inf")),
    Case(
        "a rate that diffusers' polynomial schedule cannot start from",
        options=("--lr_scheduler", "polynomial", "--learning_rate", "1e-8"),
    ),
    Case("a warm-up as long as the run", options=("--lr_scheduler", "linear", "--lr_warmup_steps", "100")),
    Case("restarts for a schedule that has none", options=("--lr_scheduler", "cosine", "--lr_num_cycles", "3")),
    Case("a weight of class images that are not used", options=("--prior_loss_weight", "0.5")),
    Case("a target of a class that is not kept", options=("--prior_target", "base_prediction")),
    Case(
        "class images where the base model's predictions keep the class",
        options=("--with_prior_preservation", "--prior_target", "base_prediction", "--num_class_images", "5"),
    ),
    Case("a negative prompt without guidance", options=("--guidance_scale", "1", "--negative_prompt", "blurry")),
    Case("scores of pictures, with a single photo", only_one, ("--score_validation", "--num_validation_images", "1")),
    Case(
        "the best step, with a single photo",
        only_one,
        ("--keep", "best", "--num_validation_images", "1"),
    ),
    Case("the best step of a run that draws nothing", options=("--keep", "best")),
    Case("held-out photos that nothing is measured on", options=("--validation_data_dir", "photos")),
    Case(
        "held-out photos that are trained on",
        options=("--validation_loss", "--validation_data_dir", "photos"),
    ),
    Case("patience without keeping the best step", options=("--patience", "5")),
    Case("changes to accept without resuming", options=("--accept_changes",)),
    Case("a revision of a local folder", options=("--revision", "main")),
    Case("an unknown tracker", options=("--report_to", "tensorboard,abacus")),
    Case(
        "a launcher with another precision",
        options=("--mixed_precision", "no"),
        environment=(("ACCELERATE_MIXED_PRECISION", "bf16"),),
    ),
    Case("a launcher with DeepSpeed", environment=(("ACCELERATE_USE_DEEPSPEED", "true"),)),
    Case("a launcher that compiles", environment=(("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),)),
    Case("negative steps", options=("--max_train_steps", "-5")),
    Case("blocks that do not divide a width", options=("--nblocks", "5")),
    Case("a resolution that is no multiple of 4", options=("--resolution", "33")),
    Case("offloaded layers without a GPU", options=("--offload_layers",)),
    Case("offloaded layers in 4 bits", options=("--offload_layers", "--quantize_base", "nf4")),
    Case("a model folder without a part", own_base(lambda folder: shutil.rmtree(folder / "vae"))),
    Case("a model folder with damaged weights", own_base(cut_weights)),
    Case("a text encoder of another width", own_base(other_text_encoder)),
    Case("a model of another architecture", set_config("unet", in_channels=9)),
    Case("a folder that is not a model's", options=("--pretrained_model_name_or_path", "photos")),
    Case("a LoRA as a base model", lora, ("--pretrained_model_name_or_path", "lora.safetensors")),
    Case("no network for a model on the hub", options=("--pretrained_model_name_or_path", "someone/some-model")),
    Case("not enough memory for the model"),
    Case("not enough memory for a training step"),
    Case("an output folder with a finished run", another_run("settings.yaml", "adapter.safetensors")),
    Case("an output folder with an unfinished run", another_run("settings.yaml", "checkpoint-5/state.pt")),
    Case("an output folder with settings of your own", another_run("settings.yaml")),
    Case("the photos' folder as output folder", options=("--output_dir", "photos")),
    Case("an output folder of a user that there is not", options=("--output_dir", "~nobody-here/out")),
    Case(
        "a misspelt setting in a file",
        lambda: Path("mine.yaml").write_text("learning_rte: 1e-4\n"),
        ("--config", "mine.yaml"),
    ),
    Case("an output folder that is a file", lambda: Path("out").touch()),
    Case("resuming where there is nothing", options=("--resume_from_checkpoint", "latest")),
    Case("resuming from a folder that is no checkpoint", options=("--resume_from_checkpoint", "photos")),
    Case(
        "resuming from a checkpoint that is not there",
        another_run("settings.yaml", "checkpoint-5/state.pt"),
        ("--resume_from_checkpoint", "checkpoint-7"),
    ),
    Case(
        "resuming where every checkpoint is damaged",
        another_run("settings.yaml", "checkpoint-5/state.pt"),
        ("--resume_from_checkpoint", "latest"),
    ),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.name)
def test_one_line_and_nothing_written(case, place, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    if "memory" in case.name:
        asking = preflight if "step" in case.name else memory
        monkeypatch.setattr(asking, "free_memory", lambda device: 100_000)
    if case.name.startswith("a file that cannot be read") and not Path("/proc/self/mem").exists():
        pytest.skip("needs a file that not even root can read, as Linux has")
    case.prepare()
    for name, value in case.environment:
        monkeypatch.setenv(name, value)
    before = everything(place)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(lambda: train(parse(TrainingConfig, "", command(*case.options))) and 0)
    assert exit_.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert everything(place) == before
    check_row(case.name, lines[0])


def exif(path: Path) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    noise(40, 30).save(path, exif=orientation)


def translucent(path: Path) -> None:
    picture = noise(40, 40)
    picture.putalpha(Image.new("L", (40, 40), 200))
    picture.save(path)


def in_kohyas_folder() -> None:
    Path("photos").rename("10_zwx dog")
    Path("photos").mkdir()
    Path("10_zwx dog").rename("photos/10_zwx dog")


def more_than_photos() -> None:
    Path("photos/raw").mkdir()
    Path("photos/gone.jpg").symlink_to("nowhere.jpg")
    for name in (".DS_Store", "notes.pages"):
        Path("photos", name).touch()


def drawn() -> PngInfo:
    told = PngInfo()
    told.add_text("gsoft_diffusion", "{}")
    return told


def nearly_the_same() -> None:
    picture = noise(40, 40).resize((400, 400), Image.Resampling.NEAREST)
    picture.save("photos/5.png")
    picture.resize((300, 300)).save("photos/6.jpg", quality=70)


def linear() -> PngInfo:
    told = PngInfo()
    told.add(b"gAMA", (100_000).to_bytes(4, "big"))
    return told


GOES_ON = [
    Case("a single photo", only_one),
    Case("a picture in Display P3", photo("5.png", lambda path: noise(40, 40).save(path, icc_profile=P3))),
    Case("a broken colour profile", photo("5.png", lambda path: noise(40, 40).save(path, icc_profile=b"none"))),
    Case("a picture of one colour", photo("5.png", Image.new("RGB", (40, 40), "navy").save)),
    Case("the same picture twice", lambda: shutil.copy("photos/1.png", "photos/5.png")),
    Case("the same picture in another size and quality", nearly_the_same),
    Case("a blurred photo", photo("5.png", lambda path: noise(8, 8).resize((400, 400)).save(path))),
    Case("a photo with fewer pixels than the model's pictures", photo("5.png", noise(20, 30).save)),
    Case("a white mask", photo("0-masklabel.png", Image.new("L", (40, 40), 255).save)),
    Case("photos in a folder as kohya names it", in_kohyas_folder),
    Case("a caption that does not name the subject", photo("1.txt", lambda path: path.write_text("a dog asleep"))),
    Case("a prompt without the class word", options=("--instance_prompt", "a photo of a zwx cat")),
    Case("a picture that was drawn", photo("5.png", lambda path: noise(40, 40).save(path, pnginfo=drawn()))),
    Case("a mask by another name", photo("0_mask.png", noise(41, 40).save)),
    Case("a PNG with another gamma", photo("5.png", lambda path: noise(40, 40).save(path, pnginfo=linear()))),
    Case("CMYK", photo("5.jpg", noise(40, 40, "CMYK").save)),
    Case("16 bits of grey", photo("5.png", Image.fromarray(np.full((40, 40), 40_000, dtype=np.uint16)).save)),
    Case("transparent parts", photo("5.png", translucent)),
    Case("rotated by EXIF data", photo("5.jpg", exif)),
    Case("a PNG with the name of a JPEG", photo("5.jpg", lambda path: noise(44, 40).save(path, "PNG"))),
    Case("files that are no pictures", more_than_photos),
    Case("a thousand words", options=("--instance_prompt", "word " * 1000)),
    Case("a rate at which nothing is learned", options=("--learning_rate", "1e-12", "--text_encoder_lr", "1e-12")),
    Case("a validation after the end", options=("--validation_steps", "5")),
    Case("a prompt like a path", options=("--instance_prompt", "../../etc/passwd")),
    Case("a prompt of emoji, control characters and lines", options=("--instance_prompt", "a 🐶\x07\x1b[2J\nof\tmine")),
]


WRITTEN = ("adapter.safetensors", "progress.jsonl", "settings.yaml", "validation")


@pytest.mark.parametrize("case", GOES_ON, ids=lambda case: case.name)
def test_goes_on_and_says_what_became_of_it(case, place, capfd, caplog):
    case.prepare()
    before = set(everything(place))
    options = (*case.options, "--num_validation_images", "1")
    result = train(parse(TrainingConfig, "", command(*options)))
    assert result.steps == 1
    new = {path.removeprefix(f"{place}/") for path in set(everything(place)) - before}
    assert new == {"out", *(f"out/{name}" for name in WRITTEN)} | {
        name
        for name in new
        if re.fullmatch(r"out/(validation/step-000001\.png|README\.md|sample_\d+\.png|images.*)", name)
    }
    printed = capfd.readouterr().out.splitlines()
    said = [line for line in printed if line.startswith(("subject", "note"))]
    said += [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    check_row(case.name, "; ".join(said))


@pytest.mark.skipif(bool(os.environ.get("UPDATE_TABLE")), reason="the table is being written")
def test_the_table_has_no_other_rows():
    names = [line.split(" | ")[0].removeprefix("| ") for line in TABLE.read_text(encoding="utf-8").splitlines()[7:]]
    assert names == [case.name for case in (*ERRORS, *GOES_ON)]
