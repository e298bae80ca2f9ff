"""The PEFT folder, lorakit's native file.

``keys`` knows the names of tensors, ``config`` the settings, ``match`` the patterns between them;
``read`` and ``write`` join the three.
"""
