"""Every script on every model family, from a tiny folder of random weights to folders that transformers loads."""

import json

import pytest
import torch

import sample_bon
import train_dpo
import train_ppo
import train_rm
import train_rrhf
import train_sft
from conftest import entry_of
from nanorlhf.data import collate, make_examples
from nanorlhf.evaluate import Options, table_columns, evaluate_policies
from nanorlhf.files import read_jsonl
from nanorlhf.formats.checkpoints import FAMILIES, PARTIAL_ROTARY, read_config, tensor_layout
from nanorlhf.model import ModelConfig, RewardModel, Transformer
from nanorlhf.options import main
from nanorlhf.tokenizer import load_tokenizer, tokenizer_of

pytestmark = pytest.mark.usefixtures("one_thread")


def write_base(folder, family, **fields):
    """Writes random weights and the built-in tokenizer. As in published models, the embedding has spare rows."""
    tokenizer = load_tokenizer("reviews")
    shape = dict(vocab_size=tokenizer.vocab_size + 7, context=80, layers=2, heads=3, kv_heads=3, head_dim=8, init_std=0.1,
                 eos_id=tokenizer.eos_id, pad_id=None)
    shape |= dict(kv_heads=1) if "kv_heads" in FAMILIES[family].keys else {}
    shape |= dict(rotary_dim=4) if family in ("gptj", *PARTIAL_ROTARY) else {}
    Transformer(ModelConfig.for_family(family, 24, **(shape | fields))).save_pretrained(folder)
    tokenizer.save(folder)


def go(module, out, **options):
    common = dict(device="cpu", out=str(out), response_length=6, num_eval_prompts=2, max_steps=1, batch_size=4, eval_every=1,
                  lr=1e-3)
    fields = module.Config.__dataclass_fields__
    entry_of(module)(module.Config(**{k: v for k, v in {**common, **options}.items() if k in fields}))
    return read_jsonl(out / "metrics.jsonl")


@pytest.fixture(scope="module", params=FAMILIES)
def chain(request, tmp_path_factory):
    """Returns (family, folder in which all scripts have run)."""
    at = tmp_path_factory.mktemp(request.param)
    write_base(at / "base", request.param)
    sft, rm = str(at / "sft"), str(at / "rm")
    go(train_sft, at / "sft", init=str(at / "base"), limit=24, eval_fraction=0.2)
    go(sample_bon, at / "bon", init=sft, reward="gold", label_temperature=0.2, split="train", limit=8, n=2, keep_unfinished=True)
    data = str(at / "bon" / "comparisons.jsonl")
    go(train_rm, at / "rm", init=sft, data=data, eval_fraction=0.2)
    go(train_ppo, at / "ppo", init=sft, reward=rm, limit=8)
    go(train_dpo, at / "dpo", init=sft, data=data, eval_fraction=0.2)
    go(train_rrhf, at / "rrhf", init=sft, reward=rm, limit=8, num_samples=2)
    return request.param, at


def test_the_first_steps_of_ppo_and_dpo_have_their_closed_forms(chain):
    _, at = chain
    first = {name: read_jsonl(at / name / "metrics.jsonl")[0] for name in ("ppo", "dpo")}
    assert abs(first["ppo"]["objective/kl"]) < 1e-6 and abs(first["ppo"]["val/ratio"] - 1) < 0.2
    assert first["dpo"]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_every_folder_keeps_its_family_and_loads_in_transformers(chain):
    family, at = chain
    tokenizer = load_tokenizer("reviews")
    own = load_tokenizer(at / "base")
    assert tokenizer_of(at / "sft", own) is own
    for name in ("sft", "rm", "ppo", "dpo", "rrhf"):
        config = json.loads((at / name / "config.json").read_text())
        kind = "classifier" if name == "rm" else "causal"
        assert config["model_type"] == family and config["architectures"] == [getattr(FAMILIES[family], kind)]
        assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_id, tokenizer.pad_id)
    transformers = pytest.importorskip("transformers", reason="needs transformers (the `parity` extra)")
    tokens = torch.arange(20).view(2, 10) + 5
    for name in ("sft", "ppo", "dpo", "rrhf"):
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(at / name, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        ours = Transformer.from_pretrained(at / name)
        with torch.no_grad():
            torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, atol=1e-5, rtol=0)


def test_reward_folders_score_a_padded_batch_as_transformers_does(chain):
    """The folder has a pad id although the base folder has none. transformers ignores `reward_mean` and `reward_std`."""
    _, at = chain
    transformers = pytest.importorskip("transformers", reason="needs transformers (the `parity` extra)")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(at / "rm").eval()
    ours, tokenizer = RewardModel.from_pretrained(at / "rm"), load_tokenizer(at / "rm")
    assert theirs.config.num_labels == 1 and theirs.config.pad_token_id == tokenizer.pad_id != tokenizer.eos_id
    assert transformers.AutoTokenizer.from_pretrained(at / "rm").pad_token_id == tokenizer.pad_id
    prompt = "Review of the film Silent River:"
    batch = collate(make_examples(tokenizer, prompt, [" The plot is great.", " Bad.", " It is not bad, but the cast is dull."]),
                    tokenizer.pad_id)
    with torch.no_grad():
        want = theirs(batch.tokens, attention_mask=(batch.tokens != tokenizer.pad_id).long()).logits[:, 0]
        got = ours.score(batch.tokens, batch.lengths) * ours.reward_std + ours.reward_mean
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_each_family_trains_from_scratch(chain, tmp_path):
    family, _ = chain
    rows = go(train_sft, tmp_path / "new", init="scratch", family=family, kind="text", limit=30, width=24, layers=1, heads=3,
              context=40)
    assert rows[0]["loss"] > 5 and Transformer.from_pretrained(tmp_path / "new").config.family == family


@pytest.mark.parametrize("family", ["mistral", "phi3", "starcoder2"])
def test_a_sliding_window_limits_the_context(family, tmp_path):
    write_base(tmp_path / "m", family)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for window, context in ((32, 32), (4096, 80), (None, 80)):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "sliding_window": window}))
        assert Transformer.from_pretrained(tmp_path / "m").config.context == context


# ---- Published models -----------------------------------------------------------------------------------------------


NEW = dict(tie_word_embeddings=False, rms_norm_eps=1e-5, hidden_act="silu")
PUBLISHED = {  # name -> (number of weights, config.json), as published, for the papers' models and their successors
    "gpt2-large": (774_030_080, dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=1280, n_layer=36, n_head=20)),
    "gpt-j-6b": (6_050_882_784, dict(
        model_type="gptj", vocab_size=50400, n_positions=2048, n_embd=4096, n_layer=28, n_head=16, rotary_dim=64,
        tie_word_embeddings=False)),
    "pythia-2.8b": (2_775_208_960, dict(
        model_type="gpt_neox", vocab_size=50304, max_position_embeddings=2048, hidden_size=2560, intermediate_size=10240,
        num_hidden_layers=32, num_attention_heads=32, rotary_pct=0.25, rotary_emb_base=10000, tie_word_embeddings=False)),
    "opt-6.7b": (6_658_473_984, dict(
        model_type="opt", vocab_size=50272, max_position_embeddings=2048, hidden_size=4096, ffn_dim=16384, num_hidden_layers=32,
        num_attention_heads=32, word_embed_proj_dim=4096, activation_function="relu", do_layer_norm_before=True)),
    "llama-7b": (6_738_415_616, NEW | dict(
        model_type="llama", vocab_size=32000, max_position_embeddings=2048, hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=32, num_attention_heads=32)),
    "llama-3.1-8b": (8_030_261_248, NEW | dict(
        model_type="llama", vocab_size=128256, max_position_embeddings=131072, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0, eos_token_id=[128001, 128008],
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=8192))),
    "mistral-7b-v0.1": (7_241_732_096, NEW | dict(
        model_type="mistral", vocab_size=32000, max_position_embeddings=32768, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, sliding_window=4096)),
    "qwen2.5-0.5b": (494_032_768, NEW | dict(
        model_type="qwen2", vocab_size=151936, max_position_embeddings=32768, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True,
        use_sliding_window=False, sliding_window=32768, max_window_layers=24)),
    "qwen3-0.6b": (596_049_920, NEW | dict(
        model_type="qwen3", vocab_size=151936, max_position_embeddings=40960, hidden_size=1024, intermediate_size=3072,
        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, rope_theta=1e6, tie_word_embeddings=True,
        use_sliding_window=False, sliding_window=None, max_window_layers=28)),
    "phi-3-mini-4k": (3_821_079_552, NEW | dict(
        model_type="phi3", vocab_size=32064, max_position_embeddings=4096, hidden_size=3072, intermediate_size=8192,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, original_max_position_embeddings=4096,
        rope_scaling=None, sliding_window=2047)),
    "starcoder2-3b": (3_030_371_328, dict(
        model_type="starcoder2", vocab_size=49152, max_position_embeddings=16384, hidden_size=3072, intermediate_size=12288,
        num_hidden_layers=30, num_attention_heads=24, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh", mlp_type="default",
        norm_type="layer_norm", norm_epsilon=1e-5, rope_theta=999999.4420358813, sliding_window=4096, use_bias=True)),
    "stablelm-3b-4e1t": (2_795_443_200, NEW | dict(
        model_type="stablelm", vocab_size=50304, max_position_embeddings=4096, hidden_size=2560, intermediate_size=6912,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, partial_rotary_factor=0.25, use_qkv_bias=False)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_number_and_shapes_of_weights(tmp_path, name):
    """On the meta device, the number of weights is the published one, and names and shapes are those of transformers."""
    count, raw = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        ours = Transformer(ModelConfig(**read_config(tmp_path)[0]))
    assert sum(p.numel() for p in ours.parameters()) == count
    transformers = pytest.importorskip("transformers", reason="needs transformers (the `parity` extra)")
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    want = {n: list(p.shape) for n, p in theirs.named_parameters()}
    family = FAMILIES[ours.config.family]
    assert {n: shape for n, shape, *_ in tensor_layout(ours, "lm_head", family.prefix)} == want


# ---- Hub names ------------------------------------------------------------------------------------------------------


def test_a_hub_name_is_downloaded_once_and_used_like_a_folder(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub (the `hub` extra)")
    write_base(tmp_path / "cache", "qwen2")
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: asked.append(name) or str(tmp_path / "cache"))
    go(train_sft, tmp_path / "out", init="somebody/tiny-qwen", limit=24, eval_fraction=0.2)
    assert load_tokenizer("somebody/tiny-qwen").same_ids(load_tokenizer("reviews"))
    assert asked == ["somebody/tiny-qwen"] and Transformer.from_pretrained(tmp_path / "out").config.family == "qwen2"


@pytest.mark.parametrize("chain", ["gpt2"], indirect=True)
def test_a_table_without_a_true_reward_has_no_gold_column(chain, tmp_path):
    _, at = chain
    (tmp_path / "x.jsonl").write_text('{"prompt": "Review of the film Silent River:"}\n{"prompt": 3}\n{"prompt": "Review:"}\n')
    options = Options(reference=str(at / "sft"), reward=str(at / "rm"), data=str(tmp_path / "x.jsonl"), num_prompts=3, num_samples=2,
                      diversity_prompts=2, response_length=6, device="cpu", skip_bad=True)
    rows, _ = evaluate_policies({"ppo": str(at / "ppo")}, options)
    columns = table_columns(rows)
    assert columns["reward/x"][0] == "reward x" and not any(c.startswith("gold/") for c in columns) and rows[1]["win_sft"]


@pytest.mark.parametrize("chain", ["gpt2"], indirect=True)
def test_ppo_prints_advice_when_no_response_ends(chain, tmp_path, capsys):
    _, at = chain
    go(train_ppo, tmp_path / "p", init=str(at / "sft"), reward="gold", limit=4, response_length=1)
    says = "no response ended within --response_length 1, and each counts as -1, not its reward (--missing_eos): raise it, or start"
    assert says in capsys.readouterr().out
    go(train_ppo, tmp_path / "q", init=str(at / "sft"), reward="gold", limit=4, response_length=1, missing_eos="none")
    assert "no response ended within --response_length 1: raise it, or start" in capsys.readouterr().out


@pytest.mark.parametrize("chain", ["llama"], indirect=True)
def test_every_checkpoint_option_accepts_hub_names(chain, tmp_path, monkeypatch):
    _, at = chain
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub (the `hub` extra)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(at / name.split("/")[1]))
    go(train_ppo, tmp_path / "ppo", init="x/sft", reference="x/dpo", reward="x/rm", value_init="x/rm", limit=8)
    go(train_ppo, tmp_path / "ppo2", init="x/sft", reward="x/rm", limit=8)
    go(sample_bon, tmp_path / "bon", init="x/sft", reward="x/rm", limit=2, n=2, keep_unfinished=True)
    assert json.loads((tmp_path / "ppo" / "run.json").read_text())["options"]["init"] == "x/sft"


def refusal(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["train_sft.py", *argv])
    with pytest.raises(SystemExit) as caught:
        main(train_sft.Config, train_sft.train, "")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hub_name_offline_gives_an_error_that_suggests_a_folder(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub (the `hub` extra)")

    def offline(name, **options):
        raise ConnectionError("no network")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", offline)
    for name in ("gpt2-of-nobody", "Qwen/Qwen2.5-0.5B"):
        message = refusal(monkeypatch, "--init", name, "--out", "x")
        assert name in message and "ConnectionError" in message and "folder of a downloaded checkpoint" in message
    assert "first run: python train_sft.py" in refusal(monkeypatch, "--out", "x")      # out/base is never a hub name


def test_a_hub_name_without_the_extra_gives_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "pip install -e '.[hub]'" in refusal(monkeypatch, "--init", "somebody/another-model", "--out", "x")
