"""The engine that speaks with IndexTTS2."""
