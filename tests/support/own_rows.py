"""Own rows as the examples that a training makes of them."""

from __future__ import annotations

from mezo.data.own import default_invocation, own_examples


def only(source, tokenizer, **options):
    """The examples of the train split, with the invocation that the data has by default."""
    keys = ("columns", "assistant_only_loss", "completion_only_loss", "chat_template_path")
    invocation = options.pop("invocation", None) or default_invocation(
        source, tokenizer, split="train", **{k: options[k] for k in keys if k in options}
    )
    return own_examples(
        source, split="train", tokenizer=tokenizer, invocation=invocation, **options
    ).examples
