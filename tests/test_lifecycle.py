"""The whole life as its user meets it: the command, a run, a kill, a change, a question, and the tools that open the result."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmbook.lifecycle import headline

ROOT = Path(__file__).resolve().parent.parent
LLMBOOK = str(Path(sys.executable).parent / "llmbook")


def llmbook(*arguments: str, folder: Path, status: int | None = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run the command as a user would, in a folder."""
    done = subprocess.run(
        [LLMBOOK, *arguments], cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=900,
    )
    assert status is None or done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with one finished smoke run, killed once on its way."""
    folder = tmp_path_factory.mktemp("workplace")
    command = [LLMBOOK, "run", "--profile", "smoke", "--settings", str(ROOT / "settings.ini")]
    first = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    model = folder / "runs/first"
    deadline = time.monotonic() + 300
    while not list(model.glob("model.partial-*")) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.2)
    time.sleep(2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (model / "model").exists() and (model / "corpus/stage.json").exists(), "killed in the middle of training"
    second = llmbook("run", "--profile", "smoke", "--settings", str(ROOT / "settings.ini"), folder=folder)
    assert re.search(r"corpus +kept", second.stdout) and not re.search(r"model +kept", second.stdout)
    return folder


@pytest.fixture(scope="session")
def run(workplace) -> Path:
    return workplace / "runs/first"


def test_the_last_screen_says_what_to_do_next(workplace):
    again = llmbook("run", "--profile", "smoke", "--settings", str(ROOT / "settings.ini"), folder=workplace).stdout
    assert "Nothing to do" in again
    assert 'llmbook ask "' in again and "llmbook serve" in again


def test_a_changed_setting_redoes_only_what_depends_on_it(workplace, run):
    before = {path.parent.name: path.stat().st_mtime_ns for path in run.glob("*/stage.json")}
    llmbook("run", "--profile", "smoke", "--settings", str(ROOT / "settings.ini"),
            "--set", "index.chunk_size=700", "--only", "index", folder=workplace)
    after = {path.parent.name: path.stat().st_mtime_ns for path in run.glob("*/stage.json")}
    assert {name for name in after if after[name] != before[name]} == {"index"}
    llmbook("run", "--profile", "smoke", "--settings", str(ROOT / "settings.ini"), folder=workplace)


def test_every_stage_has_its_record(run):
    records = json.loads((run / "run.json").read_text())["stages"]
    assert len(records) == 12
    for record in records:
        assert record["seconds"] > 0 and record["joules"] > 0 and len(record["content"]) == 64
        assert headline(record) not in ("", record["title"]), record["name"]


def test_the_report_stands_alone(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", page) and "@import" not in page
    assert "<svg" in page and "bits per byte" in page and "CO" in page


def test_transformers_opens_the_models(run):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmbook.bridge import load_decoder

    for name in ("model", "chat"):
        ids = AutoTokenizer.from_pretrained(run / name)("os.path.join joins", return_tensors="pt").input_ids
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(run / name)(ids).logits
            ours = load_decoder(run / name)(ids)
        assert torch.allclose(ours, theirs, atol=1e-4), name
    stops = json.loads((run / "chat/generation_config.json").read_text())["eos_token_id"]
    assert AutoTokenizer.from_pretrained(run / "chat").convert_tokens_to_ids("<|end|>") in stops


def test_transformers_opens_the_gguf(run, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmbook.quantization import export_gguf

    export_gguf(run / "chat", tmp_path / "model-f32.gguf", "f32")
    tokenizer = AutoTokenizer.from_pretrained(run / "chat")
    ids = tokenizer("os.path.join joins", return_tensors="pt").input_ids
    original = AutoModelForCausalLM.from_pretrained(run / "chat")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model-f32.gguf")
    small = AutoModelForCausalLM.from_pretrained(run / "quantized", gguf_file="model-q8_0.gguf")
    with torch.no_grad():
        logits = original(ids).logits
        assert torch.allclose(logits, reloaded(ids).logits, atol=1e-4)
        assert (logits - small(ids).logits).abs().max() < 0.1 * logits.abs().max()
    stop = original.generation_config.eos_token_id  # a list; a GGUF file names one end only
    texts = [
        model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=stop).tolist() for model in (original, reloaded)
    ]
    assert texts[0] == texts[1]
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model-f32.gguf")
    assert again("os.path.join joins").input_ids == ids[0].tolist()


@pytest.mark.skipif(not shutil.which("llama-cli"), reason="llama.cpp is not installed")
def test_llama_cpp_runs_the_gguf(run):
    command = ["llama-cli", "-m", str(run / "quantized/model-q8_0.gguf"), "-p", "os.path.join(", "-n", "8", "--temp", "0"]
    done = subprocess.run([*command, "-no-cnv"], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and "os.path.join(" in done.stdout, done.stderr[-2000:]


def test_sentence_transformers_opens_the_encoder(run):
    import numpy
    from sentence_transformers import SentenceTransformer

    from llmbook.encoder import encode_texts, load_encoder

    texts = ["copy a directory tree", "read a JSON file"]
    theirs = SentenceTransformer(str(run / "encoder"), device="cpu").encode(texts, normalize_embeddings=True)
    assert numpy.allclose(encode_texts(load_encoder(run / "encoder"), texts), theirs, atol=1e-5)


def test_mlflow_lists_the_run_and_its_version(workplace):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{next(workplace.rglob('mlflow.db'))}")
    models = client.search_registered_models()
    versions = client.search_model_versions(f"name = '{models[0].name}'")
    assert client.get_run(versions[0].run_id).data.metrics


def test_the_rehearsed_service_answered_over_http(run):
    numbers = json.loads((run / "service/stage.json").read_text())["numbers"]
    assert numbers["checks"] and all(numbers["checks"].values())
    assert numbers["answers"]["citations"] >= 1 and numbers["metrics"] > 20


def test_ask_answers_with_citations_and_abstains(workplace):
    answered = llmbook("ask", "what does os.replace do?", folder=workplace).stdout
    assert "os.replace" in answered and "PSF-2.0" in answered
    refused = llmbook("ask", "who won the 1998 football world cup?", folder=workplace, status=None).stdout
    assert "No answer" in refused


def test_the_service_serves_and_drains(workplace):
    import httpx
    from openai import OpenAI

    process = subprocess.Popen(
        [LLMBOOK, "serve", "--port", "0"], cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for line in process.stdout:
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        client = OpenAI(base_url=f"{found.group()}/v1", api_key="none")
        names = [model.id for model in client.models.list()]
        asked = [{"role": "user", "content": "What does os.replace do?"}]
        parts = list(client.chat.completions.create(model=names[0], messages=asked, max_tokens=8, stream=True))
        assert parts[-1].choices[0].finish_reason or parts[-2].choices[0].finish_reason
        assert "llmbook" in httpx.get(found.group()).text
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


@pytest.mark.parametrize("arguments, words", [
    (("--set", "model.stepz=3"), ("unknown setting", "model.steps")),
    (("--set", "model.steps=many"), ("model.steps", "a whole number")),
    (("--profile", "lapto"), ("unknown profile", "laptop")),
    (("--corpus", "nowhere"), ("nowhere",)),
    (("--only", "modle"), ("unknown stage", "model")),
])
def test_bad_words_get_clear_errors(tmp_path, arguments, words):
    done = llmbook("run", "--settings", str(ROOT / "settings.ini"), *arguments, folder=tmp_path, status=2)
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_empty_and_binary_corpora_are_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    done = llmbook("run", "--corpus", "texts", "--settings", str(ROOT / "settings.ini"), folder=tmp_path, status=2)
    assert "texts" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "texts/noise.txt").write_bytes(bytes(range(256)) * 50)
    done = llmbook("run", "--corpus", "texts", "--settings", str(ROOT / "settings.ini"), folder=tmp_path, status=2)
    assert "texts" in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_stage_is_noticed_and_made_again(workplace, run):
    file = run / "tokens/train.bin"
    file.write_bytes(file.read_bytes()[:-10])
    done = llmbook("run", "--profile", "smoke", "--settings", str(ROOT / "settings.ini"), "--only", "tokens",
                   folder=workplace)
    assert not re.search(r"tokens +kept", done.stdout) and re.search(r"corpus +kept", done.stdout)


def test_help_and_import_load_nothing_heavy():
    code = "import sys, llmbook.lifecycle; print({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_every_command_of_the_readme_exists(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in set(re.findall(r"llmbook (\w+)", "\n".join(re.findall(r"```bash\n(.*?)```", readme, re.S)))):
        assert "Usage" in llmbook(command, "--help", folder=tmp_path).stdout
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_code_of_the_readme_runs(workplace, run):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.S))
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "529.982.247-25" not in done.stdout and (workplace / "runs/mine").is_dir()
    shutil.rmtree(workplace / "runs/mine")
