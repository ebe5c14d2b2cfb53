"""The commands: the only room that reads arguments, prints and exits."""
