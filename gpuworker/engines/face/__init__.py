"""Engine `face`: a talking face, drawn from the sound of its speech."""
