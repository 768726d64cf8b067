"""Models of images, video or audio and text, whose language model the ranks of a sequence split."""
