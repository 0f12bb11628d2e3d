"""Text: the tokenizer files of a model, and their use: text to ids, ids to text, conversations to prompts."""
