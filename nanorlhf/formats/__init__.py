"""Other people's file formats: data layouts, chat templates, tokenizer files, checkpoints. A reader of the algorithms may skip it."""
