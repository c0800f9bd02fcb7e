"""Breaks routing, losses, capacity, resumption and the count of FLOPs in small ways, and sees whether tests notice.

    python tests/mutations.py            # all, a few minutes
    python tests/mutations.py capacity   # those whose name begins so

Works on a copy of the tracked files. Exit code 1 if a mutation survives that is not explained below.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 300


class Mutation(NamedTuple):
    """A change of one place, the tests that should fail, and, of one that none can notice, why."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    survives: str = ""


LAYER = "tests/moe/test_layer.py tests/moe/test_parity.py tests/moe/test_routers.py tests/moe/test_slot_routers.py"
RESUME = "tests/training/test_resume.py"
MUTATIONS = [
    Mutation("routing: the smallest gate is chosen", "vmoe/moe/routers.py", "remaining_GSE.argmax(-1,", "remaining_GSE.argmin(-1,", LAYER),
    Mutation("routing: an expert is chosen twice", "vmoe/moe/routers.py", "scatter(-1, best_GS1, -math.inf)", "scatter(-1, best_GS1, 0.0)", LAYER),
    Mutation("routing: weights are always renormalised", "vmoe/moe/routers.py", "keepdim=True) if renormalize else weights_GSK", "keepdim=True)", LAYER),
    Mutation("routing: noise at evaluation too", "vmoe/moe/routers.py", "self.draw_noise) if self.training else logits_TE", "self.draw_noise)", LAYER),
    Mutation("routing: noise twice as strong", "vmoe/moe/config.py", "return self.noise_std / self.num_experts", "return 2 * self.noise_std / self.num_experts", LAYER),
    Mutation("routing: sigmoid's biases decide weights", "vmoe/moe/routers.py", "weights_of(gates_GSE, chosen_GSK, self.renormalize)\n        routing", "weights_of(gates_GSE + self.bias, chosen_GSK, self.renormalize)\n        routing", LAYER),
    Mutation("routing: sigmoid's biases move the wrong way", "vmoe/moe/routers.py", "self.choices.mean() - self.choices", "self.choices - self.choices.mean()", LAYER),
    Mutation("routing: cosine without normalisation", "vmoe/moe/routers.py", "embeddings_EP = F.normalize(self.gate.weight.to(projected_TP.dtype), dim=-1)", "embeddings_EP = self.gate.weight.to(projected_TP.dtype)", LAYER),
    Mutation("routing: hash of the whole batch's position", "vmoe/moe/routers.py", "% max(groups.tokens, 1))", "% max(x_TD.shape[0], 1))", LAYER),
    Mutation("routing: Soft MoE mixes over experts", "vmoe/moe/slot_routers.py", "logits_GSN.softmax(1)", "logits_GSN.softmax(-1)", LAYER),
    Mutation("routing: expert choice takes the smallest", "vmoe/moe/slot_routers.py", "argsort(dim=-1, descending=True, stable=True)", "argsort(dim=-1, descending=False, stable=True)", LAYER),
    Mutation("capacity: one place more", "vmoe/moe/assignment.py", "kept_GSK = slots_GSK < _capacities", "kept_GSK = slots_GSK <= _capacities", LAYER),
    Mutation("capacity: rounded down", "vmoe/moe/assignment.py", "math.ceil(exact) if rounding", "math.floor(exact) if rounding", LAYER),
    Mutation("capacity: no multiple", "vmoe/moe/assignment.py", "return capacity + -capacity % multiple_of", "return capacity", LAYER),
    Mutation("capacity: second choices first", "vmoe/moe/assignment.py", "flow_GN = chosen_GSK.transpose(1, 2)", "flow_GN = chosen_GSK.flip(-1).transpose(1, 2)", LAYER),
    Mutation("capacity: priority to the smallest gates", "vmoe/moe/assignment.py", "best_GS.argsort(dim=1, descending=True", "best_GS.argsort(dim=1, descending=False", LAYER),
    Mutation("capacity: the last group has that of a full one", "vmoe/moe/assignment.py", "    if last_capacity == capacity:\n", "    if True:\n", LAYER),
    Mutation("capacity: training's at evaluation", "vmoe/moe/layer.py", '"capacity_factor" if self.training else "eval_capacity_factor"', '"capacity_factor"', LAYER),
    Mutation("losses: standard deviation for variance", "vmoe/moe/losses.py", "values_GE.var(-1, correction=0)", "values_GE.std(-1, correction=0)", LAYER),
    Mutation("losses: the unbiased variance", "vmoe/moe/losses.py", "values_GE.var(-1, correction=0)", "values_GE.var(-1, correction=1)", LAYER),
    Mutation("losses: importance from noisy logits", "vmoe/moe/losses.py", "importance_loss(routing.logits_GSE", "importance_loss(routing.noisy_logits_GSE", LAYER),
    Mutation("losses: load against the best, not the K-th", "vmoe/moe/losses.py", ".values[..., -1:]", ".values[..., :1]", LAYER),
    Mutation("losses: z-loss without the square", "vmoe/moe/losses.py", "keepdim=True).square()", "keepdim=True)", LAYER + " tests/moe/test_auxiliary_loss.py"),
    Mutation("losses: not added in training", "vmoe/training/module.py", "total = loss + vmoe.auxiliary_loss(self.model)", "total = loss + 0 * vmoe.auxiliary_loss(self.model)", "tests/training/test_training.py"),
    Mutation("resume: random states are not restored", "vmoe/training/saving.py", "            restore_random_states(self._states_to_restore)\n", "", RESUME),
    Mutation("resume: starts the epoch anew", "vmoe/training/run.py", 'data.train_sampler.start_batch = saved[ENTRY]["batches_done"]', "data.train_sampler.start_batch = 0", RESUME),
    Mutation("resume: forgets the best epoch", "vmoe/training/saving.py", '        self.best = ours["best"]\n', "", RESUME),
    Mutation("resume: forgets the average", "vmoe/training/saving.py", '            module.ema.load_state(ours["ema"])\n', "            pass\n", RESUME),
    Mutation("resume: metrics.csv keeps later rows", "vmoe/training/journal.py", 'if int(row["step"]) <= step]', "]", RESUME + " tests/training/test_training.py"),
    Mutation("resume: forgets the epoch's sums", "vmoe/training/saving.py", '        module.load_running_state(ours["running"])\n', "", RESUME),
    Mutation("FLOPs: a multiply-add counts 1", "vmoe/models/cost.py", "return 2 * x_shape[0]", "return x_shape[0]", "tests/models/test_cost.py"),
    Mutation("FLOPs: all experts count", "vmoe/models/cost.py", "return 2 * x_shape[0]", "return 2 * weight_shape[0] * x_shape[0]", "tests/models/test_cost.py"),
    Mutation("FLOPs: of two images", "vmoe/models/cost.py", "(1, in_chans, *size)", "(2, in_chans, *size)", "tests/models/test_cost.py"),
    Mutation("parameters: idle experts are active", "vmoe/models/cost.py", "return Parameters(total, total - idle)", "return Parameters(total, total)", "tests/models/test_cost.py"),
]  # fmt: skip


def main() -> int:
    """Tries the mutations, prints a line each, and gives the exit code."""
    wanted = [mutation for mutation in MUTATIONS if mutation.name.startswith(tuple(sys.argv[1:]) or "")]
    unexplained = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for mutation in wanted:
            start = time.monotonic()
            is_caught = _is_caught(copy, mutation)
            told = "caught" if is_caught else f"SURVIVES: {mutation.survives or 'unexplained'}"
            print(f"{mutation.name}: {told} ({time.monotonic() - start:.0f} s)", flush=True)
            unexplained += not is_caught and not mutation.survives
    print(f"{len(wanted)} mutations, {unexplained} unexplained survivors")
    return 1 if unexplained else 0


def _is_caught(copy: Path, mutation: Mutation) -> bool:
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) < 1:
        raise SystemExit(f"{mutation.name}: {mutation.file} no longer holds {mutation.old!r}; mend this script")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests.split()]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=SECONDS)
        return done.returncode == 1  # 2 and more: pytest could not run
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
