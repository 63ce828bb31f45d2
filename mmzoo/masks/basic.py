"""Rules that every language model knows."""

from mmzoo.masks.rule import Rule, always, everything, index, not_after, prompt, same, see, turn


def causal() -> Rule:
    """Each token sees itself and what came before."""
    return Rule("causal", (see(everything, everything, not_after(index)),))


def bidirectional() -> Rule:
    """Each token sees its whole sample."""
    return Rule("bidirectional", (see(everything, everything, always),))


def prefix() -> Rule:
    """The prompt of a turn sees itself whole; the rest is causal (PrefixLM: Raffel et al. 2020, section 3.1)."""
    return Rule("prefix", (*causal().terms, see(prompt, prompt, same(turn))))


def sliding_window(window: int) -> Rule:
    """Each token sees itself and the `window - 1` tokens before it."""
    return Rule(f"sliding-window({window})", (see(everything, everything, not_after(index, window=window)),))
