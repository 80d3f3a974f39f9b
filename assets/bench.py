"""How fast a training step is on this machine, and how much of the machine it uses.

    python cram.py bench --size base --compile
    python cram.py bench --size mini --micro_batch 32

A step is one micro-batch of random tokens: forward, backward and the optimisers. The MFU is the
model's FLOPs as a share of what a large matrix product reaches here, measured after the steps.
"""

import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cram

REPEATS = 5  # of which the median counts
SEQ_LEN = 128
VOCAB_SIZE = 2**15


def seconds_of(work, device):
    """Median seconds that work() takes, once what was queued before is done."""
    times = []
    for _ in range(REPEATS):
        wait_for(device)
        start = time.monotonic()
        work()
        wait_for(device)
        times.append(time.monotonic() - start)
    return float(np.median(times))


def wait_for(device):
    """Waits until the device has done all that was queued: else a clock would lie."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device):
    """Gigabytes that this process has used at most: of the GPU, or of the machine (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    kilobytes = status.read_text().partition("VmHWM:")[2].split()[0]
    return int(kilobytes) * 1024 / 1e9


def bench(given):
    """Prints tokens a second, MFU, memory, and the share of the time outside of the model."""
    cfg = cram.make_config(given)
    device, dtype = cram.choose_device(cfg)
    if device.type == "cpu" and "micro_batch" not in given:
        cfg.micro_batch = 32
    model = cram.Model(cfg, VOCAB_SIZE, SEQ_LEN).to(device)
    optimizers = cram.make_optimizers(model, cfg, dtype).values()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    autocast = torch.autocast(device.type, cram.DTYPES[dtype], enabled=dtype != "fp32")
    forward, rows = cram.fit(model, cfg, cfg.micro_batch, device, autocast)

    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCAB_SIZE - len(cram.SPECIALS), (rows, SEQ_LEN)).astype(np.uint16)
    run = cram.Run()

    def load():
        batches = cram.make_batches(text, np.arange(rows), rows, rng, cfg, VOCAB_SIZE, device)
        return next(batches)

    def learn(batch):
        with autocast:
            loss = forward(*batch, cfg.layers)
        scaler.scale(loss).backward()
        cram.take_step(run, loss.detach(), 0.1, model, optimizers, scaler, cfg)

    # The same step with a batch that is ready shows what loading and masking add.
    ready = load()
    learn(ready)
    whole = seconds_of(lambda: learn(load()), device)
    bare = seconds_of(lambda: learn(ready), device)
    peak = cram.matmul_rate(device, dtype)
    rate = rows * SEQ_LEN * model.flops_per_token() / whole
    compiled = "compiled" if forward is not model else "eager"
    cram.say(f"model    {cfg.recipe} {cfg.size}, {rows} rows of {SEQ_LEN} tokens")
    cram.say(f"machine  {device.type}, {dtype}, {compiled}; {peak_memory(device):.2f} GB at most")
    cram.say(f"speed    {rows * SEQ_LEN / whole:.0f} tokens/s, {rate / 1e12:.3g} TFLOP/s")
    cram.say(f"mfu      {rate / peak:.1%} of {peak / 1e12:.3g} TFLOP/s in a large matrix product")
    cram.say(f"outside  {max(0.0, 1 - bare / whole):.1%} of the time loads and masks the batch")


def main(argv):
    limits = dict.fromkeys(cram.SHARES, (0, 1))
    try:
        bench(cram.parse_flags(cram.Config, argv, __doc__, limits))
    except RuntimeError as error:
        if not re.search("(out of|enough|allocate) memory", str(error)):  # the rule of cram.main
            raise
        cram.fail("out of memory: try a smaller --micro_batch or --size")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
