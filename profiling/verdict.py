"""What binds a kernel, by its counters, and what to try next."""

from launches import Launch, short_name

BUSY = 60.0  # % of peak from which a unit binds; below it, ncu too calls a kernel latency-bound
DRAM_BEFORE_L2 = 10.0  # points: every DRAM byte passes through L2, which so looks as busy
EXTRA = 1.1  # DRAM bytes over the compulsory ones that are worth hunting
CACHED = 0.9  # below it, part of the bytes had not left or never left the caches
AT_FLOOR = 90.0  # % of floor
FULL_WAVES = 1.0
FEW_WARPS = 40.0  # % occupancy under which more warps would hide more latency

NEXT = {
    "L2": "reuse more in shared memory or registers, widen and align the accesses, and look for "
    "sectors of which only a part is used",
    "tensor pipe": "it does what it is there for: fewer FLOPs, a lower precision or larger "
    "tiles are what is left",
    "issue slots": "fewer instructions: wider loads and stores, cheaper address arithmetic, "
    "packed or tensor instructions",
    "another pipe of the SM": "see which in the report: shared memory and L1, loads and stores, or "
    "one kind of arithmetic",
}
STALL_CAUSES = {
    "long_scoreboard": "loads from memory: have more of them in flight (wider, unrolled, "
    "prefetched, asynchronous copies)",
    "short_scoreboard": "shared memory or special functions: fewer bank conflicts, fewer "
    "exponentials",
    "barrier": "the slowest warp of the block: fewer barriers, smaller blocks, more even work",
    "mio_throttle": "the queue to shared memory: fewer, wider accesses to it",
    "lg_throttle": "the queue to memory: fewer, wider loads and stores",
    "tex_throttle": "the texture queue: fewer, wider accesses",
    "math_pipe_throttle": "a busy arithmetic pipe: mix or cut the arithmetic",
    "wait": "fixed latencies of dependent instructions: more independent work in a warp",
    "gmma": "matrix products: keep more of them in flight",
    "drain": "stores at its end: fewer and wider ones",
    "membar": "memory fences: fewer, or of a narrower scope",
    "imc_miss": "constants: keep them in registers",
    "no_instruction": "the instruction cache: a smaller loop body",
    "branch_resolving": "branches: fewer of them",
    "not_selected": "other warps that were ready: the schedulers have enough to choose from",
}


def binding(launch: Launch) -> str | None:
    """What binds `launch`, or None where the report has no throughput to tell by.

    Returns:
        "DRAM bandwidth", "L2", "tensor pipe" or "issue slots", the busiest if it is busy; else
        "another pipe of the SM", "launch too small" or "latency".
    """
    units = {
        "DRAM bandwidth": launch.dram_pct,
        "L2": launch.l2_pct,
        "tensor pipe": launch.tensor_pct,
        "issue slots": launch.issue_pct,
    }
    known = {unit: percent for unit, percent in units.items() if percent is not None}
    busiest = max(known, key=known.__getitem__, default=None)
    if busiest is None:
        return None
    if known[busiest] >= BUSY:
        dram = known.get("DRAM bandwidth", 0.0)
        close = busiest == "L2" and dram >= max(BUSY, known["L2"] - DRAM_BEFORE_L2)
        return "DRAM bandwidth" if close else busiest
    if launch.sm_pct is not None and launch.sm_pct >= BUSY:
        return "another pipe of the SM"
    if launch.waves is not None and launch.waves < FULL_WAVES:
        return "launch too small"
    return "latency"


def verdict(launch: Launch, compulsory: int | None = None, floor_us: float | None = None) -> str:
    """One paragraph: what binds the kernel, the numbers that say so, and what to try next.

    `compulsory` are the bytes that the launch has to move, `floor_us` the time that takes.
    """
    bound = binding(launch)
    name = short_name(launch.kernel)
    if bound is None:
        return f"{name}: the report has no throughput of DRAM, L2 or the pipes, so no verdict."
    ratio = launch.dram_bytes / compulsory if compulsory and launch.dram_bytes else None
    percent = 100 * floor_us / launch.time_us if floor_us and launch.time_us else None
    small = "launch too small to fill the GPU"
    sentences = [f"{name}: bound by {bound}." if bound[:6] != "launch" else f"{name}: {small}."]
    sentences.append(f"{_numbers(launch, bound)}.")
    if ratio is not None and compulsory:
        sentences.append(
            f"DRAM moved {launch.dram_bytes or 0:,.0f} bytes, {ratio:.2f} x the compulsory "
            f"{compulsory:,}" + "; the rest stayed in the caches" * (ratio < CACHED) + "."
        )
    if percent is not None:
        sentences.append(f"It is at {percent:.0f} % of its floor of {floor_us:.2f} us.")
    sentences.append(f"Next: {_next(launch, bound, ratio, percent)}.")
    return " ".join(sentences)


def _numbers(launch: Launch, bound: str) -> str:
    shares = {
        "DRAM": launch.dram_pct,
        "L2": launch.l2_pct,
        "tensor pipe": launch.tensor_pct,
        "issue slots": launch.issue_pct,
        "busiest pipe of the SM": launch.sm_pct,
        "occupancy": launch.occupancy_pct,
    }
    said = [f"{name} {share:.0f} %" for name, share in shares.items() if share is not None]
    if launch.waves is not None:
        said.append(f"{launch.waves:.2g} waves")
    if launch.top_stall:
        said.append(f"top stall {launch.top_stall} ({launch.stalls[launch.top_stall]:.0f} %)")
    if bound in ("launch too small", "latency"):
        said[0] = f"no unit is at {BUSY:.0f} % of its peak: {said[0]}"
    return ", ".join(said)


def _next(launch: Launch, bound: str, ratio: float | None, percent: float | None) -> str:
    if bound == "DRAM bandwidth":
        if ratio is not None and ratio > EXTRA:
            return (
                f"move fewer bytes, {100 * (1 - 1 / ratio):.0f} % of them are not compulsory: look "
                "for spills, tensors read twice and sectors of which only a part is used"
            )
        if percent is not None and percent >= AT_FLOOR:
            return "nothing in this kernel; only fusing it with a neighbour saves its bytes"
        return "fewer bytes, by fusing with a neighbour, or wider and more even accesses"
    if bound == "launch too small":
        return "split the work into more blocks, or fuse the kernel with a neighbour"
    if bound != "latency":
        return NEXT[bound]
    stall = launch.top_stall
    cause = STALL_CAUSES.get(stall or "", "causes that its stall counters do not tell")
    advice = f"the warps wait for {cause}"
    if launch.occupancy_pct is not None and launch.occupancy_pct < FEW_WARPS and launch.limits:
        least = min(launch.limits, key=launch.limits.__getitem__)
        advice += f"; more warps would help, and {least.replace('_', ' ')} limits their number"
    return advice
