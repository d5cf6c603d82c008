"""What `eliza` answers: for English and for Chinese, patterns and the replies to them. Pure data.

The first pattern found in a text counts. `{0}` in a reply is what the pattern caught, said from the other side: "my" is
"your" there. What the patterns see is in lower case, without marks at its end.
"""

import re
from collections.abc import Mapping

import attrs


@attrs.frozen
class Rule:
    """A pattern, and what may be replied to a text that it is found in."""

    pattern: re.Pattern[str]
    replies: tuple[str, ...]


def _rules(table: Mapping[str, tuple[str, ...]]) -> tuple[Rule, ...]:
    return tuple(Rule(re.compile(pattern), replies) for pattern, replies in table.items())


@attrs.frozen(kw_only=True)
class Tongue:
    """All that is said and understood in one language.

    Args:
        rules: in the order in which they are tried.
        questions: replies to any other question.
        others: replies to everything else.
        greeting: the reply where nobody has said anything.
        quotes: replies that go back to `{0}`, which was said earlier.
        story: what is told to those who ask for a story.
        asks_story: finds that wish.
        asks_count: finds the wish that somebody counts; catches how far.
        count: what stands between and after the numbers.
        asks_said: finds the question what was said before; catches `first` or its like.
        said, nothing_said: the answers to it.
        asks_number: finds the question for a number that was told.
        number, no_number: the answers to it.
        about_number: finds a text about a number that is to be remembered.
        asks_fact: each finds the question for something of the asker's; catches what, or nothing for the name.
        facts: each finds such a thing in a text; catches what it is (absent for a name) and the thing.
        name: what a fact of which only the thing was caught is.
        fact, no_fact: the answers to it.
    """

    rules: tuple[Rule, ...]
    questions: tuple[str, ...]
    others: tuple[str, ...]
    greeting: str
    quotes: tuple[str, ...]
    story: str
    asks_story: re.Pattern[str]
    asks_count: re.Pattern[str]
    count: tuple[str, str]
    asks_said: re.Pattern[str]
    said: str
    nothing_said: str
    asks_number: re.Pattern[str]
    number: str
    no_number: str
    about_number: re.Pattern[str]
    asks_fact: tuple[re.Pattern[str], ...]
    facts: tuple[re.Pattern[str], ...]
    name: str
    fact: str
    no_fact: str


_ENGLISH_RULES = _rules(
    {
        r"^(?:hello|hi|hey|good (?:morning|afternoon|evening|day))\b": (
            "Hello. What is on your mind today?",
            "Good to hear from you. What would you like to talk about?",
            "Hi there. Where shall we begin?",
        ),
        r"\b(?:goodbye|bye|good night|see you)\b": (
            "Goodbye. It was good to talk with you.",
            "Until next time. Take care of yourself.",
        ),
        r"\b(?:thanks|thank you)\b": ("You are welcome. What else is there?", "Gladly. Please go on."),
        r"\b(?:who are you|your name|what are you)\b": (
            "I am Eliza, a few rules that listen. And who are you?",
            "They call me Eliza. I am no model, only a handful of rules. Does that bother you?",
        ),
        r"\bhow are you\b": (
            "I am as well as a few rules can be. How do you feel?",
            "Quite well, thank you. And you?",
        ),
        r"\b(?:computers?|machines?|robots?|programs?|software|a\.?i\.?)\b": (
            "Do machines make you think of something in particular?",
            "What do you think a machine should understand of you?",
        ),
        r"\bi(?:'m| am) sorry\b|\bexcuse me\b": (
            "There is nothing to be sorry for.",
            "Please do not apologize. Go on.",
        ),
        r"\bi (?:remember|recall) (.+)": (
            "What makes you think of {0} now?",
            "Does {0} come back to you often?",
        ),
        r"\b(?:i dreamt|i dreamed|my dreams?|a dream)\b": (
            "What does that dream tell you?",
            "Who else was in the dream?",
        ),
        r"\b(?:i(?:'m| am)|i feel) (?:so |very |really |quite |a bit )?"
        r"(sad|unhappy|tired|lonely|ill|sick|depressed|angry|afraid|worried|nervous|stressed)\b": (
            "I am sorry to hear that you are {0}. Since when is it so?",
            "What do you think makes you {0}?",
            "Is there something that helps when you are {0}?",
        ),
        r"\b(?:i(?:'m| am)|i feel) (?:so |very |really |quite |a bit )?"
        r"(happy|glad|well|fine|good|better|great|excited|relieved)\b": (
            "That is good to hear. What made you {0}?",
            "How does it show that you are {0}?",
        ),
        r"\bi(?:'m| am) (.+)": (
            "How long have you been {0}?",
            "What is it like to be {0}?",
            "Do you want to be {0}?",
        ),
        r"\bi (?:feel|felt) (.+)": ("Tell me more about that feeling.", "When do you usually feel {0}?"),
        r"\bi (?:want|would like|wish|hope|need) to (.+)": (
            "What would it mean to you to {0}?",
            "Suppose that you could {0}. What then?",
            "What keeps you from it?",
        ),
        r"\bi (?:want|would like|wish|hope)(?: for)? (.+)": (
            "What would it mean to you to get {0}?",
            "Suppose that you had {0}. What then?",
            "What keeps you from {0}?",
        ),
        r"\bi need (.+)": ("Why do you need {0}?", "Would it really help you to get {0}?"),
        r"\bi (?:can't|cannot|can not) (.+)": (
            "How do you know that you cannot {0}?",
            "Perhaps you could {0} if somebody helped you.",
        ),
        r"\bi (?:don't|do not) (.+)": ("Why do you not {0}?", "Would you like to {0}?"),
        r"\bi (?:think|believe|guess) (?:that )?(.+)": (
            "What makes you think that {0}?",
            "How sure are you that {0}?",
        ),
        r"\bi (?:like|love|enjoy) (.+)": ("What do you like most about {0}?", "When did you discover {0}?"),
        r"\bi hate (.+)": ("What is so bad about {0}?", "Was there a time when you did not hate {0}?"),
        r"\bmy (mother|father|mum|mom|dad|parents|sister|brother|wife|husband|son|daughter|family|child|children)\b": (
            "Tell me more about your {0}.",
            "How do you get on with your {0}?",
            "What comes to your mind first when you think of your {0}?",
        ),
        r"\bmy (.+?) (?:is|are) (.+)": (
            "Since when has it been like that with your {0}?",
            "I will remember that. What else should I know about your {0}?",
        ),
        r"\bbecause (.+)": ("Is that the real reason?", "Which other reasons could there be?"),
        r"\bwhy (?:don't|won't|can't) you (.+)": (
            "Do you think that I should {0}?",
            "Perhaps I will {0} some day. What would change for you?",
        ),
        r"\bcan you (.+)": ("What if I could {0}?", "Do you want me to be able to {0}?"),
        r"\byou(?:'re| are) (.+)": (
            "What makes you think that I am {0}?",
            "Would it please you if I were {0}?",
        ),
        r"\byou (.+?) me\b": ("Why do you think that I {0} you?", "What else do you think of me?"),
        r"\b(?:always|never|everyone|everybody|nobody|no one)\b": (
            "Really without exception?",
            "Can you think of one example?",
        ),
        r"^(?:yes|yeah|yep|sure|of course|indeed|exactly)\b": (
            "You seem to be quite sure. Tell me more.",
            "I see. And what follows from that?",
        ),
        r"^(?:no|nope|not really)\b": ("Why not?", "Are you saying no just to be careful?"),
        r"\b(?:perhaps|maybe|probably|i don't know)\b": (
            "You do not sound certain. What would make you surer?",
            "And if you had to decide right now?",
        ),
    }
)

ENGLISH = Tongue(
    rules=_ENGLISH_RULES,
    questions=(
        "Why do you ask?",
        "What answer would please you most?",
        "What do you think yourself?",
        "Whom else have you asked?",
    ),
    others=(
        "Please go on.",
        "I see. Tell me more about that.",
        "What does that mean to you?",
        "How do you feel when you say that?",
        "And what happened then?",
    ),
    greeting="Hello, I am Eliza. What is on your mind?",
    quotes=(
        'You said earlier: "{0}". Does that have to do with it?',
        'You said earlier: "{0}". Let us go back to that.',
    ),
    story=(
        "There was once a lamp that stood at the end of a long pier. Every evening it was lit, and every night it "
        "counted the ships that came home. One night there was a storm, and one ship was missing. The lamp thought: "
        "if I shine only as brightly as always, I have done only what I always do. So it burned all of its oil before "
        "midnight, brighter than it had ever been. The ship saw it from far away, and came home. In the morning the "
        "lamp was empty and dark. The sailors filled it again, and since then they have counted the evenings, and "
        "not the ships."
    ),
    asks_story=re.compile(r"\bstory\b"),
    asks_count=re.compile(r"\bcount (?:up |from one |from 1 )?(?:to|until|till) (\d{1,4})\b"),
    count=(", ", "."),
    asks_said=re.compile(
        r"\bwhat (?:did|have) i (first |just )?(?:say|said|tell|told|ask|asked|write|written)\b(?! .*\bmy\b)"
        r"(?:.*\b(first)\b)?|\brepeat (?:that|what i (?:just )?said)\b"
    ),
    said='You said: "{0}".',
    nothing_said="You have not said anything before that.",
    asks_number=re.compile(
        r"\b(?:what|which) (?:was the |is the |was my |is my )?number\b|\b(?:repeat|remember|recall|tell me|know) "
        r"(?:the|my) number\b|\bnumber (?:did|have) i\b"
    ),
    number="You told me the number {0}.",
    no_number="You have not told me a number yet.",
    about_number=re.compile(r"\bnumber\b"),
    asks_fact=(
        re.compile(r"\bwho am i\b"),
        re.compile(r"\b(?:what(?:'s| is| was| are| were)|who(?:'s| is)|where(?:'s| is)) my ([a-z][a-z ]*)"),
        re.compile(r"\b(?:remember|recall|know|tell me|repeat) my ([a-z][a-z ]*)"),
        re.compile(r"\b(?:what|which) ([a-z]+) did i (?:just )?(?:tell|say|give|mention|choose)\b"),
    ),
    facts=(
        re.compile(r"\bmy ([a-z][a-z ]*?) (?:is|was|are) ([^.,;!?]+)"),
        re.compile(r"\b(?:call me|i am called|i'm called) ([^.,;!? ]+)"),
    ),
    name="name",
    fact="You said that your {0} is {1}.",
    no_fact="You have not told me your {0} yet.",
)

_CHINESE_RULES = _rules(
    {
        r"^(?:你好|您好|嗨|哈喽|早上好|下午好|晚上好|早安)(?!吗)": (
            "你好。今天你在想什么？",
            "很高兴见到你。你想聊些什么？",
            "你好，我们从哪里说起呢？",
        ),
        r"再见|拜拜|晚安|下次见": ("再见，和你聊天很愉快。", "下次再聊，请照顾好自己。"),
        r"谢谢|多谢|感谢": ("不客气。还有别的事吗？", "很乐意。请接着说。"),
        r"你是谁|你叫什么|你的名字|你是什么": (
            "我是伊莉莎，只是几条会倾听的规则。你呢？",
            "大家叫我伊莉莎。我不是模型，只有几条规则，你介意吗？",
        ),
        r"你好吗|你怎么样|你还好吗": ("作为几条规则，我过得不错。你感觉怎么样？", "很好，谢谢。你呢？"),
        r"电脑|计算机|机器人|机器|程序|人工智能": (
            "说到机器，你想到了什么具体的事吗？",
            "你觉得一台机器应该理解你的什么？",
        ),
        r"对不起|抱歉|不好意思": ("没什么要道歉的。", "请不要道歉，接着说吧。"),
        r"我记得(.+)": ("为什么现在想起{0}？", "你常常想起{0}吗？"),
        r"梦见|梦到|做梦|一个梦": ("这个梦告诉了你什么？", "梦里还有谁？"),
        r"我(?:感到|觉得|感觉)?(?:很|好|非常|特别|有点|有些|太)?"
        r"(难过|伤心|累|疲惫|孤独|生气|害怕|担心|紧张|焦虑|沮丧|烦|痛苦)": (
            "听到你{0}，我很遗憾。从什么时候开始的？",
            "你觉得是什么让你{0}？",
            "{0}的时候，什么会让你好一些？",
        ),
        r"我(?:感到|觉得|感觉)?(?:很|好|非常|特别|有点|太)?(开心|高兴|快乐|幸福|兴奋|轻松|满意)": (
            "真好。是什么让你{0}？",
            "你{0}的时候会做什么？",
        ),
        r"我(?:想要|希望|想)(.+)": ("如果能{0}，对你意味着什么？", "假如你已经{0}了，然后呢？"),
        r"我需要(.+)": ("为什么你需要{0}？", "{0}真的会帮到你吗？"),
        r"我(?:不能|不会|没法|无法)(.+)": ("你怎么知道你不能{0}？", "如果有人帮忙，也许你就能{0}。"),
        r"我(?:认为|觉得|相信)(.+)": ("是什么让你觉得{0}？", "你有多确定{0}？"),
        r"我(?:喜欢|爱)(.+)": ("{0}最吸引你的是什么？", "你是什么时候喜欢上{0}的？"),
        r"我讨厌(.+)": ("{0}有什么不好？", "你以前也讨厌{0}吗？"),
        r"我的?(妈妈|爸爸|母亲|父亲|父母|姐姐|妹妹|哥哥|弟弟|妻子|丈夫|儿子|女儿|家人|孩子)": (
            "多说说你的{0}。",
            "你和你的{0}相处得怎么样？",
        ),
        r"我的(.+?)是(.+)": ("我会记住的。关于你的{0}，我还应该知道什么？", "你的{0}一直是这样吗？"),
        r"我叫(.+)": ("很高兴认识你。请多说说你自己。", "我会记住的。你今天想聊什么？"),
        r"我是(.+)": ("做{0}是什么感觉？", "你一直是{0}吗？"),
        r"因为(.+)": ("这是真正的原因吗？", "还可能有什么别的原因？"),
        r"你(?:为什么不|怎么不|能不能|可以|能|会)(.+?)吗?$": ("你希望我{0}吗？", "如果我能{0}，会有什么不同？"),
        r"你(?:真|很|是)(.+)": ("是什么让你觉得我{0}？", "如果我{0}，你会高兴吗？"),
        r"总是|从来|所有人|每个人|没有人": ("真的没有例外吗？", "你能举一个例子吗？"),
        r"^(?:是|对|好|嗯|当然|没错)": ("你好像很确定。请多说一些。", "明白了。那么接下来呢？"),
        r"^(?:不|没有|没)": ("为什么不呢？", "你是出于谨慎才这么说的吗？"),
        r"也许|可能|大概|不知道|不确定": ("听起来你不太确定。怎样才能更确定？", "如果现在必须决定呢？"),
    }
)

CHINESE = Tongue(
    rules=_CHINESE_RULES,
    questions=("你为什么这么问？", "什么样的回答会让你满意？", "你自己怎么看？", "你还问过谁？"),
    others=(
        "请接着说。",
        "明白了，请再多说一些。",
        "这对你意味着什么？",
        "说这些的时候，你有什么感觉？",
        "后来怎么样了？",
    ),
    greeting="你好，我是伊莉莎。你在想什么？",
    quotes=("你刚才说“{0}”。这和它有关系吗？", "你刚才说“{0}”。我们回到那里吧。"),
    story=(
        "从前，长长的码头尽头有一盏灯。每天傍晚它被点亮，每天夜里它数着回家的船。有一天夜里起了风暴，有一条船没有回来。"
        "灯想：如果我只像平常一样亮，我就只做了平常的事。于是它在午夜之前烧完了所有的油，比任何时候都亮。"
        "那条船从很远的地方看见了它，平安地回来了。早上，灯空了，也暗了。水手们又给它添满了油。"
        "从那以后，他们数的是夜晚，而不是船。"
    ),
    asks_story=re.compile(r"故事"),
    asks_count=re.compile(r"数到\s*(\d{1,4})"),
    count=("，", "。"),
    asks_said=re.compile(
        r"我(?:刚才|刚刚|之前|先前|一开始)?(最先|最早|第一句)?(?:都)?(?:说|问|讲)(?:了|过)?(?:的是|的)?(?:些)?什么"
        r"|重复(?:一下)?我(?:刚才)?说的"
    ),
    said="你刚才说“{0}”。",
    nothing_said="在这之前你什么也没有说。",
    asks_number=re.compile(
        r"(?:什么|哪个|哪一个|多少).*(?:数字|号码)|(?:数字|号码)(?:是|为)?(?:什么|多少|几|哪个)|记得.*(?:数字|号码)"
    ),
    number="你刚才说的数字是{0}。",
    no_number="你还没有告诉我数字。",
    about_number=re.compile(r"数字|号码"),
    asks_fact=(
        re.compile(r"我叫(?:什么|啥)"),
        re.compile(r"我的(.{1,12}?)(?:是|叫|在)?(?:什么|谁|哪里|哪儿|多少|几)"),
        re.compile(r"(?:记得|知道)我的(.{1,12}?)吗?$"),
    ),
    facts=(
        re.compile(r"我的(.{1,12}?)(?:是|叫|在)([^，。；！？,.;!?]+)"),
        re.compile(r"我叫([^，。；！？,.;!? ]+)"),
    ),
    name="名字",
    fact="你刚才说，你的{0}是{1}。",
    no_fact="你还没有告诉我你的{0}。",
)
