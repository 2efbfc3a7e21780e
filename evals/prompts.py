"""Prompts for an instruction-tuned model: stories, edits whose answers repeat the prompt, and texts to summarise."""

from __future__ import annotations

import re
from pydoc_data.topics import topics

# Answers that repeat their prompt: drafting from the prompt should help.
EDITS = (
    (
        "Rename the variable x to total in this code and print the whole code again:\n\n"
        "def add_all(numbers):\n    x = 0\n    for number in numbers:\n        x = x + number\n    return x\n"
    ),
    (
        "Add a docstring to this function and print the whole function again:\n\n"
        "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative size')\n    return width * height\n"
    ),
    (
        "Add type hints to this function and print the whole function again:\n\n"
        "def greet(name, greeting='Hello'):\n    message = greeting + ', ' + name + '!'\n    print(message)\n    return message\n"
    ),
    (
        "Print this class again with a method called reset that sets count to 0:\n\n"
        "class Counter:\n    def __init__(self):\n        self.count = 0\n\n    def increment(self):\n        self.count = self.count + 1\n"
    ),
    (
        "Rewrite this loop so that it skips negative values, and print the whole function again:\n\n"
        "def squares(values):\n    result = []\n    for value in values:\n        result.append(value * value)\n    return result\n"
    ),
    (
        "Change the file name to output.txt and print the whole function again:\n\n"
        "def save(lines):\n    with open('result.txt', 'w') as file:\n        for line in lines:\n            file.write(line + '\\n')\n"
    ),
)
# Answers that do not repeat their prompt.
STORIES = (
    "Write a short story about a fox who wants to learn how to swim.",
    "Explain to a child why the sky is blue and why sunsets are red.",
    "Describe a walk through an old town on a rainy evening in autumn.",
    "Tell me how bread is made, from the field to the table.",
)
WARM_UP = "Name three fruits."

MORE_STORIES = (
    "Write a short letter from a sailor to his sister about a storm.",
    "What are the advantages and the disadvantages of living in a big city?",
    "Explain how a bicycle stays upright while it is moving.",
    "Tell a joke about a programmer and a coffee machine, and explain it.",
    "Give me five ideas for a birthday party of a ten-year-old who likes dinosaurs.",
    "Summarise what photosynthesis is in a few sentences.",
    "Write a poem of eight lines about the sea in winter.",
    "How do I prepare for a job interview? Give me some advice.",
)
MORE_EDITS = (
    (
        "Rename the function f to is_even and print the whole code again:\n\n"
        "def f(number):\n    return number % 2 == 0\n\n\nfor number in range(10):\n    if f(number):\n        print(number, 'is even')\n"
    ),
    (
        "Sort these imports and print the whole file again:\n\n"
        "import sys\nimport os\nimport json\nimport argparse\n\n\n"
        "def main():\n    parser = argparse.ArgumentParser()\n    print(os.getcwd())\n"
    ),
    (
        "Replace the magic number by a constant called LIMIT and print the whole code again:\n\n"
        "def check(values):\n    for value in values:\n"
        "        if value > 100:\n            raise ValueError('too large')\n    return True\n"
    ),
    (
        "Correct the spelling in this text and print it again:\n\n"
        "The quik brown fox jumps over the lazy dog. The dog is not amused, but the fox does not care and runs away into the forrest.\n"
    ),
    (
        "Make this function return a dictionary instead of a tuple, and print the whole function again:\n\n"
        "def statistics(values):\n    total = sum(values)\n    count = len(values)\n    return total, count, total / count\n"
    ),
    (
        "Change every single quote to a double quote and print the code again:\n\n"
        "names = ['Anna', 'Bert', 'Carla', 'Dora']\nfor name in names:\n"
        "    print('Hello, ' + name)\n    print('How are you, ' + name + '?')\n"
    ),
)


def summaries(count: int = 12) -> tuple[str, ...]:
    """Prompts that ask for a summary of a paragraph of Python's own reference, 80 to 170 words each, in alphabetical order of topics."""
    paragraphs = []
    for _, topic in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", topic):
            text = " ".join(paragraph.split())
            if 500 < len(text) < 1100 and text[0].isupper() and ">>>" not in text:
                paragraphs.append(text)
    return tuple(f"Summarise this text in a few sentences:\n\n{text}" for text in paragraphs[: 5 * count : 5])
