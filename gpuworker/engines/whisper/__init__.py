"""Engine `whisper`: transcripts by faster-whisper."""
