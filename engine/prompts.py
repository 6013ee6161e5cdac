"""Prompts as tokens: templates, what a prompt opens for its completion, and the id that ends a turn."""

import contextlib
import multiprocessing
import re
import resource

from .errors import BadArgument

TEMPLATE_SECONDS, TRIED = 5, set()  # of a chat template's first text, of processor time; (template, roles, ...) that have written one
THINKING = "(?:think|thought|reason)"  # in the name of a tag
INSTRUCTIONS = dict(  # system message of the templates that bring one
    r1="This is a conversation between User and Assistant. User asks a question and Assistant solves it. Assistant thinks first, between "
       "<think> and </think>, and then gives User the answer between <answer> and </answer>, with the final result in \\boxed{}.",
    qwen_math="Please reason step by step, and put your final answer within \\boxed{}.")


def render_prompt(tokenizer, prompt, template="auto", system_prompt=None):
    """The text of a prompt that the model reads.

    prompt: a string, or messages [{"role", "content"}, ...] that end with the user's. A system message of their own stays. Otherwise
    they get `system_prompt`, or the template's instruction. Templates: "chat" is the tokenizer's own. "none" joins the contents by
    newlines. "auto" is chat if there is one, else none. "r1" is the text for base models of DeepSeek-R1-Zero [arXiv 2501.12948
    table 1]; the completion begins inside <think>. "qwen_math" is the chat layout of Qwen2.5-Math, for tokenizers that lack it.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "none"
    system_prompt = INSTRUCTIONS.get(template) if system_prompt is None else system_prompt
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if template == "r1":
        speakers = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        return "\n".join([speakers[turn["role"]] + turn["content"] for turn in messages] + ["Assistant: <think>"])
    if template == "qwen_math":
        return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages) + "<|im_start|>assistant\n"
    if template == "none":
        return "\n".join(turn["content"] for turn in messages)
    if not tokenizer.chat_template:
        raise BadArgument("--template chat: the tokenizer has no chat template; use --template none")
    return render_chat(tokenizer, messages)


def render_chat(tokenizer, messages, add_generation_prompt=True):
    """The text of messages by the tokenizer's own chat template. A template is a program of others: it is tried in a child first.

    Raises BadArgument for a template that refuses these roles, fails, writes nothing, or does not end within TEMPLATE_SECONDS.
    """
    def render():
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def attempt():
        resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS))  # the system ends it, inside of 9**9**9, too
        with contextlib.suppress(Exception):
            render()

    roles = ", ".join(turn["role"] for turn in messages)
    if (case := (str(tokenizer.chat_template), roles, add_generation_prompt)) not in TRIED:
        child = multiprocessing.get_context("fork").Process(target=attempt, daemon=True)
        child.start()
        child.join(60)
        child.kill()
        child.join()
        if child.exitcode:
            raise BadArgument(f"the chat template does not end within {TEMPLATE_SECONDS} seconds; use another --template")
        TRIED.add(case)
    try:
        text = render()
    except Exception as error:  # Gemma's, say, knows no system message
        raise BadArgument(f"the chat template refuses messages of {roles}: {error}; use another --template") from error
    if not text.strip():
        raise BadArgument(f"the chat template writes nothing for messages of {roles}; use another --template")
    for turn in messages:  # but an assistant's, whose thinking templates cut
        if turn["role"] != "assistant" and "".join(turn["content"].split()) not in "".join(text.split()):
            raise BadArgument(f"the chat template leaves out the {turn['role']}'s message {ascii(turn['content'])[:40]}; "
                              "use another --template")
    return text


def encode_prompt(tokenizer, text):
    """Rendered prompt -> token ids, with what the tokenizer puts in front of a text (BOS, [gMASK] <sop>) once: templates may write it."""
    ids, begun, bare, whole = (tokenizer(each, add_special_tokens=special)["input_ids"]
                               for each, special in ((text, False), (text.lstrip(), False), ("a", False), ("a", True)))
    front = next((whole[:start] for start in range(len(whole)) if whole[start : start + len(bare)] == bare), [])
    return ids if begun[: len(front)] == front else front + ids


def stop_ids(tokenizer):
    """Every id that ends a completion: those of the model that the tokenizer came with, or its EOS."""
    return getattr(tokenizer, "stop_ids", [tokenizer.eos_token_id])


def end_of_turn(tokenizer, template):
    """The id that ends a solution: the one that the template writes after it, if sampling stops there; otherwise EOS."""
    mark, tail = "The-solution", ""
    if template == "qwen_math":
        tail = "<|im_end|>"
    elif template in ("auto", "chat") and tokenizer.chat_template:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": mark}]
        with contextlib.suppress(BadArgument):
            tail = render_chat(tokenizer, turns, add_generation_prompt=False).rpartition(mark)[2]
    ends = stop_ids(tokenizer)
    eos = ends[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return next((index for index in tokenizer(tail, add_special_tokens=False)["input_ids"] if index in ends), eos)


def opened_tag(tokenizer, prompt_ids):
    """The name of the tag that a prompt opens for the thinking of its completion, think of <think>, or None."""
    found = re.search(rf"<(\w*{THINKING}\w*)>\s*\Z", tokenizer.decode(prompt_ids[-32:]), re.IGNORECASE)
    return found and found[1]


def closed_thinking(tokenizer, prompt_ids):
    """Does a prompt open and close the thinking of its completion, as templates do whose thinking is turned off?"""
    tail = tokenizer.decode(prompt_ids[-32:])
    return re.search(rf"<(\w*{THINKING}\w*)>\s*</\1>\s*\Z", tail, re.IGNORECASE) is not None


def after_tag(text, tag):
    """A solution as it goes on after a prompt that opens `tag`: the tag stands once and is closed, at once where the text never does.

    tag=None: thinking that is closed and was opened by the template of another model is opened here.
    """
    if not text.strip():
        return text
    if tag is None:
        closed = re.search(rf"</(\w*{THINKING}\w*)>", text, re.IGNORECASE)
        return text if closed is None or f"<{closed[1]}>" in text[: closed.start()] else f"<{closed[1]}>\n{text.lstrip()}"
    text = re.sub(rf"\A\s*<{tag}>\s*", "", text)
    return text if f"</{tag}>" in text else f"</{tag}>\n\n{text.lstrip()}"
