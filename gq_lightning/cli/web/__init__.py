"""The page to try a tokenizer: `trial` compares, `work` holds the models, `page` shows it."""
