"""What people type: arguments and what is printed; everything else is in the rooms before."""
