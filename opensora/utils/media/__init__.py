"""Reading of clips and pictures as people have them: one reader for training, references, evaluation and data tools."""
