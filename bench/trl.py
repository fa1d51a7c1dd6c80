"""A whole round, this trainer against TRL's IW-OPD trainer: one process, one thread, one workload.

Both read the same folders of random weights and the same 512 prompts, sample exactly 64 tokens to
64 prompts of 32 (the end-of-sequence id lies outside the model's vocabulary), score them with the
teacher, take one AdamW step and generate with the new weights. Their runs alternate, each in a
process of its own. TRL lives in a virtual environment of its own, which `make bench-trl` builds.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",  # it warns of the end-of-sequence id
}
TRL_PYTHON = Path("build/trl-venv/bin/python")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 64
VOCABULARY, EOS = 512, "<eos>"
FIRST_SYMBOL = 0x4E00  # one Unicode character a token
LR, WEIGHT_DECAY, GAMMA = 1e-3, 0.01, 0.5
REPEATS, WARM_UP, ROUNDS = 3, 3, 12
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32)
STUDENT = ATTENTION | dict(
    hidden_size=128,
    num_hidden_layers=4,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    norm_topk_prob=True,
    intermediate_size=128,  # no layer is dense
)
TEACHER = ATTENTION | dict(
    hidden_size=192, num_hidden_layers=6, intermediate_size=384, num_attention_heads=6
)


def write_workload(folder):
    """Student and teacher with random weights, prompts, and the recipe of this trainer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    write_model(folder / "student", Qwen3MoeForCausalLM, Qwen3MoeConfig, STUDENT, seed=0)
    write_model(folder / "teacher", Qwen3ForCausalLM, Qwen3Config, TEACHER, seed=1)
    rng = random.Random(0)
    prompts = [rng.choices(range(VOCABULARY), k=PROMPT_TOKENS) for _ in range(8 * PROMPTS)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    problem = {"answer": "", "difficulty": 0, "source": "selection_sort"}
    lines = [problem | {"question": "".join(map(symbol, prompt))} for prompt in prompts]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "student": {"hf": str(folder / "student")},
        "teacher": {"hf": str(folder / "teacher"), "microbatch_tokens": 2048},
        "data": {"train": str(folder / "train.jsonl")},
        "rollout": {"max_prompt_tokens": PROMPT_TOKENS, "max_response_tokens": NEW_TOKENS},
        # TRL's choices: its total includes the last token, its mean is over tokens
        "loss": {
            "weighting": {"gamma": GAMMA, "denominator": "inclusive"},
            "aggregation": "token_mean",
        },
        "train": {
            "rounds": WARM_UP + ROUNDS,
            "prompts_per_round": PROMPTS,
            "lr": LR,
            "weight_decay": WEIGHT_DECAY,
        },
        "checkpoint": {"every": None},
        "processes": 1,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def symbol(token):
    return chr(FIRST_SYMBOL + token)


def write_model(folder, model_class, config_class, sizes, seed):
    """A Hugging Face folder; its tokenizer's last id, EOS, has no row in the model."""
    import torch

    from iwopd_megatron.toy_task import write_tokenizer

    torch.manual_seed(seed)
    special = dict(pad_token_id=None, bos_token_id=None, eos_token_id=VOCABULARY)
    config = config_class(vocab_size=VOCABULARY, max_position_embeddings=128, **special, **sizes)
    model_class(config).save_pretrained(folder)
    symbols = [*map(symbol, range(VOCABULARY)), EOS]
    write_tokenizer(folder, symbols, pad=EOS, eos=EOS, unknown=EOS)


def run_ours(folder, run):
    """The measured rounds of one run: `seconds`, and `time` by phase."""
    from iwopd_megatron.records.runlog import read_metrics

    train = ["-m", "iwopd_megatron", "train", folder / "recipe.yaml", f"out={folder / run}"]
    subprocess.run([sys.executable, "-W", "ignore", *train], check=True)
    rounds = [line for line in read_metrics(folder / run) if line["kind"] == "round"]
    assert {line["response_tokens"] for line in rounds} == {PROMPTS * NEW_TOKENS}
    return rounds[WARM_UP:]


def run_trl(folder):
    """The same of TRL. -P: this file's folder must not hide the package of its name."""
    subprocess.run([TRL_PYTHON, "-W", "ignore", "-P", __file__, folder], check=True)
    return json.loads((folder / "trl.json").read_text())[WARM_UP:]


def trl_worker(folder):
    """Inside TRL's environment: train, and write the seconds of every step."""
    import torch
    from transformers import PrinterCallback
    from trl.experimental.iw_opd import IWOPDTrainer

    def collate(prompts):
        ids = torch.tensor(prompts)
        prompt = {"prompts": ids, "prompt_attention_mask": torch.ones_like(ids)}
        labels = torch.full_like(ids, -100)
        return prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    torch.set_num_threads(1)
    trainer = IWOPDTrainer(
        str(folder / "student"),
        str(folder / "teacher"),
        trl_config(folder),
        data_collator=collate,
        train_dataset=json.loads((folder / "prompts.json").read_text()),
    )
    # Otherwise the loss is divided by the number of labels before generation, which is 0.
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    steps = clock(trainer)
    trainer.train()
    (folder / "trl.json").write_text(json.dumps(steps))


def trl_config(folder):
    """The fastest settings that compute the same: one batch, no recomputation, nothing logged."""
    from trl.experimental.iw_opd import IWOPDConfig

    common = {"dtype": "float32", "attn_implementation": "sdpa"}
    return IWOPDConfig(
        output_dir=str(folder / "trl"),
        model_init_kwargs=common | {"experts_implementation": "grouped_mm"},
        teacher_model_init_kwargs=common,
        max_length=PROMPT_TOKENS + NEW_TOKENS,
        max_completion_length=NEW_TOKENS,
        per_device_train_batch_size=PROMPTS,
        max_steps=WARM_UP + ROUNDS,
        iw_opd_gamma=GAMMA,
        temperature=1.0,
        top_p=1.0,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def clock(trainer):
    """A list to which every step of the trainer adds its `seconds`, and `time` by phase."""
    from transformers import TrainerCallback

    phases, steps = {}, []

    def timed(name, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            phases[name] = time.perf_counter() - start
            return result

        return call

    class Clock(TrainerCallback):
        """From the end of one step to the end of the next, so that nothing is left out."""

        def on_train_begin(self, *args, **kwargs):
            self.last = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds = time.perf_counter() - self.last
            labels = trainer._buffered_inputs[0]["labels"]
            assert int((labels != -100).sum()) == PROMPTS * NEW_TOKENS
            rest = {"train": seconds - sum(phases.values())}
            steps.append({"seconds": seconds, "time": phases | rest})
            self.last = time.perf_counter()

    trainer._generate_student_completions = timed("generate", trainer._generate_student_completions)
    trainer._get_teacher_logits = timed("score", trainer._get_teacher_logits)
    trainer.add_callback(Clock())
    return steps


def main():
    ours, trl = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_workload(folder)
        for i in range(REPEATS):  # alternate, so that a slow minute of the machine hits both
            ours.append(run_ours(folder, f"run-{i}"))
            trl.append(run_trl(folder))
    pairs = [median(b) / median(a) for a, b in zip(ours, trl, strict=True)]
    ours, trl = sum(ours, []), sum(trl, [])
    tokens = PROMPTS * NEW_TOKENS
    print(
        f"one round: {PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens each; "
        f"fp32, one CPU thread, medians of {len(ours)} rounds in {REPEATS} runs each, alternating"
    )
    print("| trainer | seconds a round | new tokens/s | ratio |")
    print("| --- | --- | --- | --- |")
    for name, rounds in (("TRL 1.16.0", trl), ("iwopd_megatron", ours)):
        value = median(rounds)
        print(f"| {name} | {value:.3f} | {tokens / value:,.0f} | {median(trl) / value:.2f} |")
    print(f"ratio of each pair of runs: {', '.join(f'{ratio:.2f}' for ratio in pairs)}\n")
    print("| phase | iwopd_megatron ms | TRL ms |")
    print("| --- | --- | --- |")
    for phase in ours[0]["time"]:
        theirs = f"{median(trl, phase) * 1e3:.0f}" if phase in trl[0]["time"] else ""
        print(f"| {phase} | {median(ours, phase) * 1e3:.0f} | {theirs} |")
    ratio = median(trl) / median(ours)
    print(json.dumps({"tokens_per_second_over_trl": round(ratio, 3)}))


def median(rounds, phase=None):
    """Seconds of a round, or of one of its phases."""
    return statistics.median(line["time"][phase] if phase else line["seconds"] for line in rounds)


if __name__ == "__main__":
    trl_worker(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
