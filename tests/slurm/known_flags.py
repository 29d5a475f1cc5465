"""The flags of Megatron's parser with the plugin's and the command's own, for a check without torch.

python -m tests.slurm.known_flags > megatron_hybrid/known_flags.txt     # after a change of Megatron or of the plugin
"""

from __future__ import annotations

import argparse


def lines() -> list[str]:
    """`--flag kind`, sorted; kind: none (takes no value), int, float, the legal words joined by |, or text; + after
    it: any number of values."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_hybrid.config import HybridConfig
    from megatron_hybrid.fp8 import RECIPES

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    HybridConfig.add_to(parser)
    found = {"--without": "text"}  # the command's own, besides --preset
    for action in parser._actions:
        words = [word for word in action.choices or () if isinstance(word, str)]
        if "--fp8-recipe" in action.option_strings:
            words = [word for word in words if word in RECIPES]  # what is refused later is not offered
        text = "|".join(words) if len(words) > 1 else "text"
        kind = "none" if action.nargs == 0 else {int: "int", float: "float"}.get(action.type, text)  # type: ignore[arg-type]
        kind += "+" * (action.nargs not in (0, None))
        found |= {name: kind for name in action.option_strings if name.startswith("--")}
    return [f"{name} {kind}" for name, kind in sorted(found.items()) if name != "--help"]


if __name__ == "__main__":
    print("\n".join(lines()))
