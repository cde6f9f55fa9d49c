"""What every command needs: options, errors, ranks, precision, signals."""
