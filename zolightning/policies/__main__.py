"""``python -m zolightning.policies FILE [--png OUT]``: the table and the picture of a policy."""

from __future__ import annotations

import argparse
import sys

from zolightning.policies.library import load_policy
from zolightning.policies.show import picture, text_table


def main(arguments: list[str] | None = None) -> int:
    """Show one policy; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m zolightning.policies", description="Show what a policy does.")
    parser.add_argument("policy", help="a safetensors file, a published .pth file, or the name of a shipped policy")
    parser.add_argument("--loss", type=float, default=0.5, help="loss of the previous step (default: 0.5)")
    parser.add_argument("--png", help="also draw a picture into this file")
    parser.add_argument("--save", help="also write the policy as safetensors into this file")
    options = parser.parse_args(arguments)
    try:
        policy = load_policy(options.policy)
        print(text_table(policy, options.loss))
        if options.png:
            picture(policy, options.png, options.loss)
        if options.save:
            policy.save_pretrained(options.save)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
