"""What a user types, and where: the words of a command, the current folder, and the streams of the process."""
