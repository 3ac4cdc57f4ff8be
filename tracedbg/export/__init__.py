"""What goes to the tools of others and takes the replay: how long each frame lived, and what was found."""
