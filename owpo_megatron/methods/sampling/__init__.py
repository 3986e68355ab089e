"""Methods that differ in what is drawn: how many siblings, of which prompts, from where, with what help."""
