"""Prompts of race_middle.yaml: those of the harness's task `race`, for a data set with one row per question."""

import itertools


def by_passage(dataset):
    """Joins the rows of each passage (adjacent rows with the same example_id): 'article' and a list of 'problems'."""
    passages = []
    for _, rows in itertools.groupby(dataset, key=lambda row: row["example_id"]):
        rows = list(rows)
        problems = [{name: row[name] for name in ("question", "answer", "options")} for row in rows]
        passages.append({"article": rows[0]["article"], "problems": problems})
    return dataset.from_list(passages)


def doc_to_text(doc):
    """Returns the passage, all questions but the last with their answers, and the last question."""
    text = f"Article: {doc['article']}\n\n"
    *earlier, last = doc["problems"]
    for problem in earlier:
        answer = problem["options"]["ABCD".index(problem["answer"])]
        if problem["question"].endswith("  _  ."):
            text += f"{problem['question'][:-5]}{answer}\n"
        else:
            text += f"Question: {problem['question']}\nAnswer: {answer}\n"
    return text + last["question"]


def doc_to_choice(doc):
    """Returns the four options of the last question."""
    return doc["problems"][-1]["options"]


def doc_to_target(doc):
    """Returns the index of the correct option."""
    return "ABCD".index(doc["problems"][-1]["answer"])
