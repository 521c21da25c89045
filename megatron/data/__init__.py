"""From files of tokens to the micro-batches of a step."""
