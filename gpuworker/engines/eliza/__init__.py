"""Engine `eliza`: a conversation without a model, in English and Chinese."""
